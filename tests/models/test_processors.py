"""Processors come with the tokenizer, are saved with the model, and are compared where two models share pictures."""

import pytest
from transformers import AutoTokenizer

from minillm.config.models import TeacherConfig
from minillm.models.processors import UnreadVideos, placeholder_ids, processor_of, same_pictures
from minillm.models.tokenizers import apply_chat_template, byte_tokenizer, end_of_turn, in_parts, load_tokenizer
from tests.pictures import KINDS, build_processor, picture, save_seeing


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "gemma3"]
)  # its tokens' names are its own tokenizer's
def test_a_saved_model_comes_back_with_its_processor(tmp_path, kind):
    folder = save_seeing(kind, tmp_path / "model")
    before = build_processor(kind)
    tokenizer = load_tokenizer(TeacherConfig(path=str(folder)), tmp_path)
    after = processor_of(tokenizer)
    assert type(after).__name__ == type(before).__name__ and after.tokenizer is tokenizer
    assert same_pictures(before, after) is None and placeholder_ids(after) == placeholder_ids(before)
    assert tokenizer.chat_template == before.chat_template
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)


def test_what_reads_videos_is_kept_for_the_file(tmp_path):
    """Nothing here reads videos, and a processor without torchvision still has its settings to hand on."""
    for place in ("first", "second"):
        processor = build_processor("qwen2_vl")
        processor.video_processor.settings["fps"] = 2.0
        processor.save_pretrained(tmp_path / place)
        again = processor_of(load_tokenizer(TeacherConfig(path=str(tmp_path / place)), tmp_path))
        assert isinstance(again.video_processor, UnreadVideos)
        assert again.video_processor.to_dict() == {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 2.0}


def test_text_models_have_none(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert processor_of(load_tokenizer(TeacherConfig(path=str(tmp_path)), tmp_path)) is None
    assert processor_of(byte_tokenizer()) is None


def test_processors_that_make_other_pictures_differ():
    ours, theirs = build_processor("llava"), build_processor("llava")
    assert same_pictures(ours, theirs) is None
    theirs.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert "image_processor.image_mean is" in same_pictures(ours, theirs)
    assert same_pictures(ours, build_processor("qwen2_vl")) is not None


def test_a_template_of_parts_ends_a_turn_as_one_of_texts():
    tokenizer = build_processor("llava").tokenizer
    assert end_of_turn(tokenizer) == 256
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    assert apply_chat_template(tokenizer, asked, add_generation_prompt=True) == "<user><image>what?\n<assistant>"
    asked = [in_parts({"role": "user", "content": "what?"})]
    assert apply_chat_template(tokenizer, asked, add_generation_prompt=True) == "<user>what?\n<assistant>"


def test_a_template_that_takes_texts_alone_is_given_texts():
    tokenizer = build_processor("llava").tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] + '!' if m['content'] is string else '' }}{% endfor %}"
    )
    assert apply_chat_template(tokenizer, [{"role": "user", "content": "what?"}]) == "what?!"


def test_pictures_are_made_alike_every_time():
    processor = build_processor("idefics3")
    first, second = (processor(images=[[picture(3)]], text=["<image>"], return_tensors="pt") for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)
