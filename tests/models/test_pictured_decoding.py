"""Cached decoding of left-padded prompts with pictures is one full pass over each answer, whatever numbers the tokens."""

import pytest
import torch

from minillm.data.images import Picture, PictureReader
from minillm.models.access import last_hidden, lm_head, row_hidden
from minillm.models.batch import TokenSequence, collate
from minillm.models.families import answer_beside_pictures, decoder, own_positions, placeholder_id, sees_pictures
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from tests.pictures import KINDS, build_processor, build_seeing, picture
from tests.rollout.local.test_shared_prompts import answers_in_a_running_batch

CPU = torch.device("cpu")


def png(image) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module", params=KINDS)
def seeing(request):
    """A student and a wider teacher of one architecture, and prompts of unequal length with none, one and two pictures
    of different sizes."""
    kind = request.param
    processor = build_processor(kind)
    student, teacher = build_seeing(kind, processor), build_seeing(kind, processor, width=48, seed=1)
    for model in (student, teacher):
        answer_beside_pictures(model, True)
    tokenizer = processor.tokenizer
    models = Models(student, LocalTeacher(teacher), tokenizer, len(tokenizer), (256,), 256, CPU)
    around = "<|vision_start|><|image_pad|><|vision_end|>" if kind.startswith("qwen2") else processor.image_token
    reader = PictureReader(processor, max_pixels=10**6)
    prompts = []
    for number, (text, sizes) in enumerate(
        [("a", [(40, 30)]), ("what is it, and why?", []), ("two of them", [(30, 80), (56, 56)]), ("b?", [(90, 28)])]
    ):
        files = [png(picture(10 * number + place, *size)) for place, size in enumerate(sizes)]
        shown = [Picture("test", "a picture", lambda file=file: file) for file in files]
        if shown:
            prompts.append(reader.read("test", around * len(shown) + text, shown, special=True))
        else:
            prompts.append((tokenizer(text).input_ids, {}))
    return models, prompts


@torch.no_grad()
def full_logprobs(models, role, prompt, extras, response):
    """(T, V) float64 from a lone, unpadded pass of the model itself, over all that the processor said of the prompt."""
    model = models.model(role)
    ids = torch.tensor([prompt + response])
    kinds = {}
    if model.config.model_type == "paligemma":
        kinds["token_type_ids"] = torch.tensor([[0] * len(prompt) + [1] * len(response)])
    elif model.config.model_type == "gemma3":
        kinds["token_type_ids"] = (ids == placeholder_id(model.config)).long()
    elif model.config.model_type.startswith("qwen2"):
        kinds["mm_token_type_ids"] = (ids == placeholder_id(model.config)).long()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **kinds, **extras, use_cache=False).logits
    logits = logits[0, len(prompt) - 1 : -1].double()
    logits[:, placeholder_id(model.config)] = -torch.inf
    return logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("who", "coins"), [("student", False), ("teacher", False), ("mixture", False), ("mixture", True)]
)
def test_the_cached_loop_is_a_full_pass(seeing, who, coins):
    models, prompts = seeing
    alpha = 0.4 if who == "mixture" else 0.0
    answers = LocalRollouts(models, shared_coins=coins).sample(
        [ids for ids, _ in prompts],
        Sampling(12, alpha=alpha),
        keys=range(4),
        seed=3,
        who=who,
        batch_size=4,
        extras=[extras for _, extras in prompts],
    )
    for answer, (ids, extras) in zip(answers, prompts, strict=True):
        assert answer.extras is extras
        said = {
            role: full_logprobs(models, role, ids, extras, answer.response)
            for role in (("student", "teacher") if who == "mixture" else (who,))
        }
        if who == "mixture":
            both = torch.stack(
                [said["student"] + torch.tensor(1 - alpha).log(), said["teacher"] + torch.tensor(alpha).log()]
            )
            expected = both.logsumexp(0)
        else:
            expected = said[who]
        expected = expected.gather(1, torch.tensor(answer.response)[:, None])[:, 0]
        torch.testing.assert_close(answer.logprobs.double(), expected, atol=2e-4, rtol=1e-4)


def test_answers_to_the_same_pictures_begin_in_rows_of_a_running_batch(seeing):
    """Of two prompts at a time, each with its own shift of positions, beside a row that goes on with another one."""
    models, prompts = seeing
    if not hasattr(decoder(models.student), "get_rope_index"):
        pytest.skip("no picture shifts the positions after it")
    running = prompts[2]  # the longest one
    asked = [prompt for prompt in (prompts[0], prompts[3]) for _ in range(2)]
    answers = answers_in_a_running_batch(models, running, asked)
    for answer, (ids, extras) in zip(answers, [*asked, running], strict=True):
        said = full_logprobs(models, "student", ids, extras, answer.response)
        expected = said.gather(1, torch.tensor(answer.response)[:, None])[:, 0]
        torch.testing.assert_close(answer.logprobs.double(), expected, atol=2e-4, rtol=1e-4)


def test_a_batch_of_all_is_each_by_itself(seeing):
    """Right-padded, joined pictures: what the losses read is what a lone pass gives."""
    models, prompts = seeing
    generator = torch.Generator().manual_seed(5)
    sequences = [
        TokenSequence(ids, torch.randint(1, 256, (length,), generator=generator).tolist(), extras=extras)
        for (ids, extras), length in zip(prompts, (5, 3, 1, 8), strict=True)
    ]
    head = lm_head(models.student)
    batch = collate(sequences, 256)
    with torch.no_grad():
        hidden = row_hidden(models.student, batch)
    ours = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)).double().log_softmax(-1)
    for sequence, said in zip(sequences, batch.split(ours), strict=True):
        expected = full_logprobs(models, "student", sequence.prompt, sequence.extras, sequence.response)
        torch.testing.assert_close(said, expected, atol=2e-4, rtol=1e-4)


def test_joined_pictures_are_the_processors_own_batch(seeing):
    models, prompts = seeing
    alone = [extras for _, extras in prompts if extras]
    joined = collate([TokenSequence([1], [2], extras=extras) for extras in alone], 0).extras
    processor = models.tokenizer.picture_processor
    around = (
        "<|vision_start|><|image_pad|><|vision_end|>" if "Qwen" in type(processor).__name__ else processor.image_token
    )
    images = [[picture(0, 40, 30)], [picture(20, 30, 80), picture(21, 56, 56)], [picture(30, 90, 28)]]
    made = processor(
        images=images,
        text=[around * len(shown) for shown in images],
        padding=True,
        return_tensors="pt",
    )
    for name, tensor in joined.items():
        assert torch.equal(made[name], tensor), name


def test_text_alone_is_read_as_by_a_text_model(seeing):
    models, prompts = seeing
    model, (ids, extras) = models.student, prompts[1]
    assert sees_pictures(model) and not extras
    row = torch.tensor([ids])
    with torch.no_grad():
        expected = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
        ours = model.get_output_embeddings()(last_hidden(model, row, torch.ones_like(row)))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_positions_are_the_models_own(seeing):
    """Qwen2-VL counts a picture's tokens along its sides: fewer positions than tokens, so that later ones are moved."""
    models, prompts = seeing
    ids, extras = prompts[2]
    row = torch.tensor([ids])
    kinds = {"mm_token_type_ids": (row == placeholder_id(models.student.config)).long()}
    numbered = own_positions(models.student, row, torch.ones_like(row), {**extras, **kinds})
    assert (numbered is None) == (not hasattr(decoder(models.student), "get_rope_index"))
    if numbered is not None:
        positions, shift = numbered
        assert positions.shape == (3, 1, len(ids)) and shift.shape == (1, 1) and shift.item() < 0
        assert positions[:, 0, -1].tolist() == [len(ids) - 1 + shift.item()] * 3
