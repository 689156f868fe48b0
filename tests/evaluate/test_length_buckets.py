"""Scores by the length of the reference."""

from minillm.evaluate.length_buckets import bucket_names, mean_by_length


def test_an_edge_is_the_last_length_of_its_bucket():
    scores, lengths = [10.0, 20.0, 30.0, 50.0, None], [5, 6, 10, 11, 3]
    assert mean_by_length(scores, lengths, [5, 10]) == {"0_5": (10.0, 1), "6_10": (25.0, 2), "11_up": (50.0, 1)}


def test_an_empty_bucket_is_absent_and_without_edges_there_is_one():
    assert mean_by_length([1.0, 3.0], [20, 30], [5]) == {"6_up": (2.0, 2)}
    assert bucket_names([]) == ["0_up"]
