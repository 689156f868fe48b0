"""FLOPs and seconds against sums written out by hand, from the counts of a small model."""

from dataclasses import replace

import pytest

from minillm.planning.gpus import BANDWIDTH_USE, LINK_USE, MFU, Gpu
from minillm.planning.sharding import Sharding
from minillm.planning.simulate import Simulation
from minillm.planning.sizes import ModelSize
from minillm.planning.speed import _reading_seconds, flops_per_token, forward_flops, speed_of
from minillm.planning.work import Decoding, Forward, TermShape, Work

# 1,000 weights: 100 in the head, 100 in a token table, 800 in two layers of 400
STUDENT = ModelSize(
    1000,
    2,
    2000,
    100,
    100,
    layers=2,
    largest_layer=400,
    hidden_size=10,
    kv_bytes_per_token=80,
    trained=1000,
)
TEACHER = ModelSize(
    5000, 2, 10000, 200, 0, layers=4, largest_layer=1200, hidden_size=20, kv_bytes_per_token=320, trained=0
)
GPU = Gpu("test", 1.0, bf16_tflops=1e-6, fp32_tflops=5e-7, memory_gb_per_s=1e-3, link_gb_per_s=1e-4)
PROMPT, ANSWER, MICRO = 5, 4, 2
LENGTH, ROWS = PROMPT + ANSWER - 1, MICRO * ANSWER


def simulated(student=STUDENT, pictures=0, **counts):
    """`pictures`: of a prompt, each of which takes 30 FLOPs of the student and 70 of the teacher."""
    student, teacher = replace(student, pictures=30 * pictures), replace(TEACHER, pictures=70 * pictures)
    return Simulation({}, student, teacher, vocab_size=10, losses={}, **counts)


def speed(work, *, sharding=None, checkpointing=False, bf16=True, **counts):
    options = {"bf16": bf16, "checkpointing": checkpointing}
    return speed_of(simulated(**counts), work, sharding or Sharding(), GPU, **options)


def work(**parts):
    term = TermShape("policy", MICRO, LENGTH, ROWS, teacher=True, from_buffer=bool(parts.get("buffered")))
    return Work(**{"decodings": (), "scorings": (), "terms": (term,), "micro_batches": 3,
                   "steps_per_collection": 1, "buffered": 0, **parts})  # fmt: skip


def test_a_forward_pass_reads_the_layers_and_attends():
    assert forward_flops(STUDENT, tokens=7, context=3) == 7 * (2 * 800 + 4 * 3 * 10 * 2)


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 3), (True, 4)])
def test_an_update_is_three_passes_and_four_head_products(checkpointing, passes):
    body = MICRO * LENGTH * (2 * 800 + 4 * LENGTH * 10 * 2)
    heads = ROWS * 2 * (3 * 100 + 200)
    assert speed(work(), checkpointing=checkpointing).update_flops == 3 * (passes * body + heads)


@pytest.mark.parametrize(("checkpointing", "passes"), [(False, 2), (True, 3)])
def test_frozen_weights_below_adapters_cost_a_pass_and_a_head_product_less(checkpointing, passes):
    body = MICRO * LENGTH * (2 * 800 + 4 * LENGTH * 10 * 2)
    heads = ROWS * 2 * (2 * 100 + 200)
    frozen = replace(STUDENT, trained=50, frozen=True)
    found = speed(work(), student=frozen, checkpointing=checkpointing)
    assert found.update_flops == 3 * (passes * body + heads)
    optimizer = found.seconds["update"] - found.update_flops / (1e6 * MFU)
    assert optimizer == pytest.approx(50 * 7 * 4 / (1e6 * BANDWIDTH_USE))


def test_a_collection_is_shared_by_the_steps_that_use_it():
    decoding = Decoding(("student", "teacher"), 4, PROMPT, ANSWER, total=8)
    scoring = Forward(("teacher", "student"), 4, LENGTH, 4 * ANSWER, True, total=8)
    found = speed(work(decodings=(decoding,), scorings=(scoring,), steps_per_collection=4, buffered=8))
    tokens = 8 * LENGTH
    heads = 8 * ANSWER * 2 * (100 + 200)
    matrices, widths = 2 * 800 + 2 * (5000 - 200), 10 * 2 + 20 * 4
    assert found.rollout_flops == (tokens * (matrices + 4 * LENGTH / 2 * widths) + heads) / 4
    assert found.scoring_flops == (tokens * (matrices + 4 * LENGTH * widths) + heads) / 4


def test_a_prompt_is_read_once_for_several_answers():
    one = Decoding(("student",), 4, PROMPT, ANSWER, total=8)
    alone, four = (speed(work(decodings=(each,), buffered=8)) for each in (one, replace(one, per_prompt=4)))
    assert alone.rollout_flops - four.rollout_flops == 8 * PROMPT * (1 - 1 / 4) * (2 * 800 + 4 * LENGTH / 2 * 10 * 2)


def test_a_picture_is_looked_at_where_its_prompt_is_read():
    """Once for several answers while they are sampled, and again for each of them where it is scored or learned from."""
    decoding = Decoding(("student", "teacher"), 4, PROMPT, ANSWER, total=8, per_prompt=4)
    scoring = Forward(("teacher",), 4, LENGTH, 4 * ANSWER, True, total=8)
    both = work(decodings=(decoding,), scorings=(scoring,), buffered=8)
    none, two = (speed(both, pictures=pictures) for pictures in (0, 2))
    assert two.rollout_flops - none.rollout_flops == 8 / 4 * 2 * (30 + 70)
    assert two.scoring_flops - none.scoring_flops == 8 * 2 * 70
    assert two.update_flops - none.update_flops == 3 * MICRO * 2 * 3 * 30  # micro-batches, sequences, pictures, passes
    again = speed(both, pictures=2, checkpointing=True).update_flops - speed(both, checkpointing=True).update_flops
    assert again == 3 * MICRO * 2 * 4 * 30
    frozen = replace(STUDENT, pictures_frozen=True)
    once = speed(both, pictures=2, student=frozen).update_flops - speed(both, student=frozen).update_flops
    assert once == 3 * MICRO * 2 * 30
    judged = replace(both, terms=(replace(both.terms[0], from_buffer=False),))
    more = speed(judged, pictures=2).scoring_flops - speed(judged).scoring_flops
    assert more == 8 * 2 * 70 + 3 * MICRO * 2 * 70
    assert flops_per_token(simulated(pictures=2), scoring) - flops_per_token(simulated(), scoring) == 2 * 70 / LENGTH


def test_standardised_logits_take_products_of_heads_with_themselves():
    plain = work()
    (term,) = plain.terms
    more = speed(replace(plain, terms=(replace(term, standardizes=True),))).update_flops - speed(plain).update_flops
    products = 2 * (2 * 100 * 10 + 200 * 20)  # the student's and its gradient, and the teacher's
    assert more == 3 * (products + ROWS * 3 * 2 * 100)  # micro-batches; another pass over the student's head


def test_texts_without_prompts_show_no_pictures():
    scoring = Forward(("teacher",), 4, LENGTH, 4 * ANSWER, True, total=8, prompted=False)
    plain = work(scorings=(scoring,), buffered=8)
    plain = replace(plain, terms=tuple(replace(one, prompted=False, from_buffer=False) for one in plain.terms))
    none, two = (speed(plain, pictures=pictures) for pictures in (0, 2))
    assert two == none and flops_per_token(simulated(pictures=2), scoring) == flops_per_token(simulated(), scoring)


def test_one_of_several_teachers_judges_its_part_of_the_records():
    both = work(scorings=(Forward(("teacher",), 4, LENGTH, 4 * ANSWER, True, total=8),), buffered=8)
    all_of_them, third = (speed(both, asked=asked) for asked in (1.0, 1 / 3))
    assert third.scoring_flops == pytest.approx(all_of_them.scoring_flops / 3)
    assert all_of_them.update_flops - third.update_flops == pytest.approx(2 / 3 * 3 * ROWS * 2 * 200)


def test_a_term_that_trains_the_teacher_has_its_size():
    adapted = work()
    adapted = replace(adapted, terms=(replace(adapted.terms[0], trains="teacher", teacher=False),))
    body = MICRO * LENGTH * (2 * 4800 + 4 * LENGTH * 20 * 4)
    assert speed(adapted).update_flops == 3 * 3 * (body + ROWS * 2 * 200)


def test_a_token_of_a_stage_without_steps_has_its_part_of_the_heads():
    scoring = Forward(("student", "teacher"), 4, LENGTH, 4 * ANSWER, True, total=8)
    bodies = 2 * 800 + 4 * LENGTH * 10 * 2 + 2 * 4800 + 4 * LENGTH * 20 * 4
    assert flops_per_token(simulated(), scoring) == pytest.approx(bodies + 2 * (100 + 200) * ANSWER / LENGTH)
    assert flops_per_token(simulated(), replace(scoring, statistics=False)) == bodies


def test_coins_read_a_model_where_it_is_asked_and_both_heads_once_more():
    decoding = Decoding(("student", "teacher"), 4, PROMPT, ANSWER, total=8)
    coins = replace(decoding, teacher_share=0.25)
    kept = Forward(("student",), 4, LENGTH, 4 * ANSWER, True, total=8, kept=("teacher",))
    both, asked = (speed(work(decodings=(one,), scorings=(kept,), buffered=8)) for one in (decoding, coins))
    more = 8 * ANSWER * 2 * (0.75 * 100 + 0.25 * 200)
    assert asked.rollout_flops - both.rollout_flops == more
    assert asked.scoring_flops == 8 * LENGTH * (2 * 800 + 4 * LENGTH * 10 * 2) + 8 * ANSWER * 2 * (100 + 200)
    slow = replace(GPU, memory_gb_per_s=1e-9)
    seconds = [_reading_seconds(one, {"student": STUDENT, "teacher": TEACHER}, slow) for one in (decoding, coins)]
    alone = [
        _reading_seconds(replace(decoding, models=(name,)), {"student": STUDENT, "teacher": TEACHER}, slow)
        for name in ("student", "teacher")
    ]
    assert seconds[0] == pytest.approx(sum(alone)) and seconds[1] == pytest.approx(0.75 * alone[0] + 0.25 * alone[1])


def test_supervised_scoring_has_no_head_and_is_not_shared():
    scoring = Forward(("teacher",), MICRO, LENGTH, ROWS, False, total=6)
    assert speed(work(scorings=(scoring,))).scoring_flops == 6 * LENGTH * (2 * 4800 + 4 * LENGTH * 20 * 4)


def test_a_term_beside_the_buffer_has_its_teacher_run_in_every_step():
    """The pre-training loss with pt_kd_ratio."""
    scoring = Forward(("teacher", "student"), 4, LENGTH, 4 * ANSWER, True, total=8)
    alone = work(scorings=(scoring,), steps_per_collection=4, buffered=8)
    pretraining = TermShape("pretraining", MICRO, 20, MICRO * 20, teacher=True, from_buffer=False)
    both = replace(alone, terms=(*alone.terms, pretraining))
    more = 3 * MICRO * 20 * (2 * 4800 + 4 * 20 * 20 * 4)
    assert speed(both).scoring_flops - speed(alone).scoring_flops == more
    sharded = Sharding(world_size=2, stage=3, teacher="sharded")
    alone, both = (speed(one, sharding=sharded).seconds["communication"] for one in (alone, both))
    moved = (3 * 2 * 1000 * 2 + 3 * 200 * 2 + 3 * 5000 * 2) / 2  # the student's passes, the head, the whole teacher
    assert both - alone == pytest.approx(moved / (1e5 * LINK_USE))


def test_decoding_takes_what_reading_takes_where_that_is_longer():
    decoding = Decoding(("student",), 4, PROMPT, ANSWER, total=8)
    read = (1000 - 100) * 2 + 4 * (PROMPT + ANSWER / 2) * 80  # bytes for a token of a batch
    seconds = speed(work(decodings=(decoding,))).seconds
    by_flops = speed(work(decodings=(decoding,))).rollout_flops / (1e6 * MFU)
    by_reading = 2 * ANSWER * read / (1e6 * BANDWIDTH_USE)
    assert seconds["rollout"] == pytest.approx(max(by_flops, by_reading)) and by_reading > 0


def test_adam_reads_and_writes_seven_words_a_weight_of_its_share():
    alone, halved = (
        speed(work(), sharding=Sharding(world_size=size, stage=1)).seconds["update"]
        - speed(work()).update_flops / (1e6 * MFU)
        for size in (1, 2)
    )
    assert alone == pytest.approx(1000 * 7 * 4 / (1e6 * BANDWIDTH_USE)) and halved == pytest.approx(alone / 2)


def test_fp32_weights_run_at_the_rate_of_fp32():
    wide = replace(STUDENT, itemsize=4)
    optimizer = 1000 * 7 * 4 / (1e6 * BANDWIDTH_USE)
    slow, fast = (speed(work(), student=wide, bf16=bf16).seconds["update"] - optimizer for bf16 in (False, True))
    assert slow == pytest.approx(2 * fast)
    scoring = work(scorings=(Forward(("teacher", "student"), 4, LENGTH, 4 * ANSWER, True, total=8),))
    body, heads = 8 * LENGTH * (2 * 800 + 4 * LENGTH * 10 * 2), 8 * ANSWER * 2 * 100
    for bf16 in (False, True):  # which is for the update alone
        slow, fast = (speed(scoring, student=size, bf16=bf16).seconds["scoring"] for size in (wide, STUDENT))
        assert slow - fast == pytest.approx((body + heads) / (1e6 * MFU))


def test_what_travels_between_two_ranks():
    scoring = Forward(("teacher", "student"), 4, LENGTH, 4 * ANSWER, True, total=8)
    decoding = Decoding(("student", "teacher"), 4, PROMPT, ANSWER, total=8)
    both = work(decodings=(decoding,), scorings=(scoring,), steps_per_collection=4, buffered=8)
    sharded = Sharding(world_size=2, stage=3, teacher="sharded")
    student, teacher = 1000 * 2, 5000 * 2
    gradients, passes, heads = 2 * student, 2 * student * 3, 3 * 200 * 2
    collected = 2 * (student + teacher) / 4  # sampled and scored, once each, for four steps
    moved = (gradients + passes + heads + collected) / 2
    assert speed(both, sharding=sharded).seconds["communication"] == pytest.approx(moved / (1e5 * LINK_USE))
    supervised = work(scorings=(Forward(("teacher",), MICRO, LENGTH, ROWS, False, total=6),))
    moved = (gradients + passes + heads + 3 * teacher) / 2  # layer by layer, in each of three passes
    assert speed(supervised, sharding=sharded).seconds["communication"] == pytest.approx(moved / (1e5 * LINK_USE))
    assert speed(both).seconds["communication"] == 0
    layers = Sharding(world_size=2, stage=3, teacher="sharded", by_layers=True)
    passes_of_both = (student + teacher) * (2 * ANSWER + 2) / 4  # two batches, at every token, and scored
    moved = (gradients + passes + heads + passes_of_both) / 2
    assert speed(both, sharding=layers).seconds["communication"] == pytest.approx(moved / (1e5 * LINK_USE))
