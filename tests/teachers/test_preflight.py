"""What a pair of models must share, and what is said where it does not."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast

from minillm.config.models import TeacherConfig
from minillm.models.access import lm_head
from minillm.models.loading import load_teacher
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer, load_tokenizer
from minillm.teachers.local import LocalTeacher
from minillm.teachers.preflight import PreflightError, end_ids, preflight
from tests.conftest import tiny_llama
from tests.pictures import build_processor, build_seeing
from tests.pretended_devices import pretended_devices

CPU = torch.device("cpu")


def words(*names: str, **special) -> PreTrainedTokenizerFast:
    vocabulary = {name: index for index, name in enumerate(names)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=names[0])), **special)


def test_padded_vocabularies_are_cut_to_the_shared_part(build_model):
    student, teacher = build_model("llama", vocab_size=260), LocalTeacher(build_model("gpt2", vocab_size=264))
    tokenizer = byte_tokenizer()
    models, rows = preflight(student, teacher, tokenizer, byte_tokenizer(), CPU)
    assert models.vocab_size == 260
    assert models.student is student and models.teacher is teacher and models.tokenizer is tokenizer
    table = {name: (ours, theirs) for name, ours, theirs in rows}
    assert table["head rows"] == ("260", "264, cut to 260")
    assert table["model"] == ("LlamaForCausalLM", "GPT2LMHeadModel")


def test_devices_are_shown_where_there_are_two(build_model):
    tokenizer = byte_tokenizer()
    with pretended_devices():
        student, model = build_model("llama", vocab_size=260), build_model("llama", vocab_size=260)
        _, rows = preflight(student, LocalTeacher(model), tokenizer, tokenizer, CPU)
        assert "device" not in [name for name, *_ in rows]
        teacher = LocalTeacher(model.to("xpu:1"))
        _, rows = preflight(student, teacher, tokenizer, tokenizer, CPU)
    assert ("device", "cpu", "xpu:1") in rows and teacher.device == CPU


def test_padding_that_is_also_an_eos_is_shown(build_model):
    models, rows = preflight(build_model("llama", vocab_size=257), None, byte_tokenizer(), None, CPU)
    assert models.pad_id == models.eos_ids[0] == 256
    assert ("padding", "'<|end|>', also an EOS", "-") in rows


def test_the_first_differing_token_is_named(build_model):
    ours, theirs = words("a", "b", "c", "d", eos_token="a"), words("a", "b", "x", "y", eos_token="a")
    with pytest.raises(PreflightError, match="id 2 is 'c' for the student and 'x' for the teacher"):
        preflight(build_model("llama"), LocalTeacher(build_model("llama")), ours, theirs, CPU)


def test_a_missing_token_differs_too(build_model):
    ours, theirs = words("a", "b", eos_token="a"), words("a", "b", "c", eos_token="a")
    with pytest.raises(PreflightError, match="id 2 is None for the student and 'c' for the teacher"):
        preflight(build_model("llama"), LocalTeacher(build_model("llama")), ours, theirs, CPU)


def test_a_tokenizer_with_ids_beyond_the_heads(build_model):
    with pytest.raises(
        PreflightError, match=r"257 tokens, but the heads share only 71 rows \(student 300, teacher 71\)"
    ):
        teacher = LocalTeacher(build_model("llama"))
        preflight(build_model("llama", vocab_size=300), teacher, byte_tokenizer(), byte_tokenizer(), CPU)


def test_no_end_of_text(build_model):
    model = build_model("llama", eos_token_id=None)
    with pytest.raises(PreflightError, match="names an EOS token"):
        preflight(model, None, words("a", "b"), None, CPU)


def test_every_end_counts_and_the_tokenizers_comes_first(build_model):
    model = build_model("llama")
    model.generation_config.eos_token_id = [2, 1]
    assert end_ids(model, words("a", "b", "c", eos_token="b")) == (1, 2)
    model.generation_config.eos_token_id = 1
    assert end_ids(model, words("a", "b", "c", eos_token="b")) == (1,)
    assert end_ids(model, words("a", "b", "c")) == (1,)


def test_an_end_that_no_head_row_answers_to_is_left_out(build_model):
    """A fresh small vocabulary under a published configuration keeps that one's EOS id, which pads nothing here."""
    model = build_model("llama")
    model.generation_config.eos_token_id = [1, 50256]
    models, _ = preflight(model, None, words("a", "b", "c"), None, CPU)
    assert models.eos_ids == (1,) and models.pad_id == 1


def test_what_ends_an_answer_for_either_model_ends_it_for_both(build_model, tmp_path):
    """A base student beside a chat teacher: past the teacher's end of turn there is nothing to learn from it."""
    student, teacher = build_model("llama"), build_model("llama", vocab_size=75)
    names = ("a", "b", "c", "d")
    student.generation_config.eos_token_id, teacher.generation_config.eos_token_id = 1, [2, 1, 73]
    models, _ = preflight(
        student, LocalTeacher(teacher), words(*names, eos_token="b"), words(*names, eos_token="c"), CPU
    )
    assert models.eos_ids == (1, 2), "73 is no id of the student's"
    save_model(student, models.tokenizer, tmp_path / "model")
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [1, 2]


def test_a_templates_end_of_turn_is_an_end(build_model):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}"
    model = build_model("llama", vocab_size=258, eos_token_id=256)
    models, rows = preflight(model, None, tokenizer, None, CPU)
    assert models.eos_ids == (256, 257)
    assert ("end of answer", "'<|end|>', '<|turn|>'", "-") in rows


@pytest.mark.parametrize("change, expected", [(None, "none"), ("{{ messages }}", "another one"), ("", "the same")])
def test_templates_are_compared(build_model, change, expected):
    ours, theirs = byte_tokenizer(), byte_tokenizer()
    theirs.chat_template = ours.chat_template if change == "" else change
    student, teacher = (build_model("llama", vocab_size=257) for _ in range(2))
    _, rows = preflight(student, LocalTeacher(teacher), ours, theirs, CPU)
    assert ("chat template", "there", expected) in rows


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_head_that_does_more_than_the_losses_see_is_refused(build_model, who):
    models = {name: build_model("llama", vocab_size=257) for name in ("student", "teacher")}
    models[who].lm_head.register_forward_hook(lambda module, inputs, output: 1.01 * output)
    with pytest.raises(PreflightError, match=f"{who}: the logits of LlamaForCausalLM differ .* by 1.0%"):
        preflight(models["student"], LocalTeacher(models["teacher"]), byte_tokenizer(), byte_tokenizer(), CPU)


def test_tied_weights_are_counted_once(build_model):
    sizes = []
    for tie in (False, True):
        _, rows = preflight(
            build_model("llama", vocab_size=257, tie_word_embeddings=tie), None, byte_tokenizer(), None, CPU
        )
        sizes.append(int(dict((row[0], row[1]) for row in rows)["parameters"].replace(",", "")))
    assert sizes[0] - sizes[1] == 257 * 24


def test_real_models_of_two_tokenizers(assets):
    """Both were trained on the same stories, with other vocabularies."""
    pairs = []
    for name in ("stories260k", "babyllama105"):
        config = TeacherConfig(path=str(assets / "models" / name))
        model = load_teacher(config, output_dir=assets, device=CPU)
        pairs.append((model, load_tokenizer(config, assets)))
    (stories, subwords), (baby, letters) = pairs
    models, _ = preflight(stories, LocalTeacher(stories), subwords, subwords, CPU)
    assert models.vocab_size == 512
    with pytest.raises(PreflightError, match="id \\d+ is .* for the student and .* for the teacher"):
        preflight(stories, LocalTeacher(baby), subwords, letters, CPU)


def test_placeholders_of_pictures_have_no_probability_where_both_models_see():
    """Where one of them reads text alone, a ban of the other would make a divergence of the two infinite."""
    processor = build_processor("llava")
    tokenizer, size, image = processor.tokenizer, len(processor.tokenizer), processor.image_token_id
    student, seeing = build_seeing("llava", processor), build_seeing("llava", processor, width=48, seed=1)
    blind = tiny_llama(vocab_size=size)
    for teacher, banned in ((seeing, True), (blind, False), (None, True), (seeing, True)):
        judge = None if teacher is None else LocalTeacher(teacher)
        preflight(student, judge, tokenizer, None if judge is None else tokenizer, CPU)
        for model in (student, teacher):
            if model is not None:
                bias = lm_head(model).bias
                assert (bias is not None and bias[image] == -torch.inf) == banned


def test_a_tokenizer_that_spells_pictures_otherwise_than_the_model_is_refused():
    processor = build_processor("llava")
    student = build_seeing("llava", processor, image_token_id=3)
    with pytest.raises(PreflightError, match="student: a picture stands in prompts as id 257 .* and as 3 by the model"):
        preflight(student, None, processor.tokenizer, None, CPU)


def test_a_model_that_reads_padding_as_text_is_refused(build_model, monkeypatch):
    model = build_model("llama", vocab_size=257)
    monkeypatch.setattr("minillm.teachers.preflight.padding_error", lambda model: 0.3)
    with pytest.raises(PreflightError, match=r"student: LlamaForCausalLM computes something else .* \(by 30.0%\)"):
        preflight(model, None, byte_tokenizer(), None, CPU)


def test_a_model_that_cannot_be_run_is_one_sentence(build_model, monkeypatch):
    model = build_model("llama", vocab_size=257)

    def refuse(*args, **kwargs):
        raise TypeError("topk(): argument 'k' must be int, not NoneType")

    monkeypatch.setattr(model.model, "forward", refuse)
    for dtype, advice in (
        (torch.float32, "; its configuration"),
        (torch.bfloat16, "; where .* bfloat16 there, float32"),
    ):
        with pytest.raises(
            PreflightError,
            match=r"student: LlamaForCausalLM cannot be run on a few tokens in \w+ on the cpu \(TypeError: topk.*\)"
            + advice,
        ):
            preflight(model.to(dtype), None, byte_tokenizer(), None, CPU)


@pytest.mark.parametrize(
    "raised", [ImportError("no such kernel"), NotImplementedError("not\nhere"), ZeroDivisionError("0")]
)
def test_whatever_a_models_code_raises_is_one_sentence(build_model, monkeypatch, raised):
    model = build_model("llama", vocab_size=257)

    def refuse(*args, **kwargs):
        raise raised

    monkeypatch.setattr(model.model, "forward", refuse)
    with pytest.raises(PreflightError, match=rf"on the cpu \({type(raised).__name__}: [a-z0 ]+\); its"):
        preflight(model, None, byte_tokenizer(), None, CPU)


def test_a_full_memory_is_no_fault_of_the_model(build_model, monkeypatch):
    model = build_model("llama", vocab_size=257)

    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(model.model, "forward", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        preflight(model, None, byte_tokenizer(), None, CPU)
