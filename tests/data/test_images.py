"""Pictures of records in every form, each in its place and with its own pixels; what cannot be shown is named."""

import base64
import io
import json

import pytest
import torch
from PIL import ExifTags, Image

from minillm.config.analysis_keys import JsonlLabels
from minillm.config.data import HfPrompts, JsonlPrompts, ParquetPrompts
from minillm.data import images
from minillm.data.images import Picture
from minillm.data.instructions import load_prompts, require_shared_pictures
from minillm.data.labels import load_labels
from minillm.data.sources import DataError
from minillm.models.tokenizers import byte_tokenizer
from tests.pictures import build_processor, picture


def encoded(number: int, form: str = "png", **size) -> bytes:
    file = io.BytesIO()
    picture(number, **size).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def processor():
    return build_processor("llava")


@pytest.fixture
def files(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    return tmp_path


def pixels(processor, *numbers: int) -> torch.Tensor:
    return processor.image_processor([picture(number) for number in numbers], return_tensors="pt")["pixel_values"]


def read(processor, path, **keys):
    keys = {"template": "chat", **keys}
    return load_prompts(JsonlPrompts(path=str(path), **keys), processor.tokenizer)


def uri(number: int) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(number)).decode()


def part(**source) -> dict:
    return {"type": "image", **source}


TEXT = {"type": "text", "text": "what?"}
# a record, the pictures that it shows, and its prompt
FORMS = {
    "a path": ({"prompt": "what?", "image": "1.png"}, [1], "<user><image>what?\n<assistant>"),
    "an address of data": ({"question": "what?", "image": uri(2)}, [2], "<user><image>what?\n<assistant>"),
    "several": ({"instruction": "what?", "images": ["1.png", uri(0)]}, [1, 0], "<user><image><image>what?\n<assistant>"),
    "marked places": (
        {"instruction": "is <image> like <image>?", "images": ["2.png", "1.png"]},
        [2, 1],
        "<user>is <image> like <image>?\n<assistant>",
    ),
    "a part with a path": ({"messages": [{"role": "user", "content": [TEXT, part(path="1.png")]}]}, [1],
                           "<user>what?<image>\n<assistant>"),
    "a part as an API has it": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri(1)}}, TEXT]}]},
        [1],
        "<user><image>what?\n<assistant>",
    ),
    "parts and a column": (
        {"messages": [{"role": "user", "content": [part(), TEXT, part()]}], "images": ["0.png", "2.png"]},
        [0, 2],
        "<user><image>what?<image>\n<assistant>",
    ),
    "a column before the first question": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "what?"}], "image": "1.png"},
        [1],
        "<system>s\n<user><image>what?\n<assistant>",
    ),
    "none": ({"prompt": "what?", "image": None, "images": []}, [], "<user>what?\n<assistant>"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form(processor, files, form):
    record, shown, text = FORMS[form]
    (files / "data.jsonl").write_text(json.dumps({**record, "unused": 1}) + "\n")
    (example,) = read(processor, files / "data.jsonl")
    assert example.prompt == text
    placeholder = processor.image_token_id
    assert example.prompt_ids.count(placeholder) == 4 * len(shown)  # 28 x 28 in patches of 14
    kept = [index for index in example.prompt_ids if index != placeholder]
    assert kept == processor.tokenizer(text.replace("<image>", "")).input_ids
    if shown:
        assert set(example.extras) == {"pixel_values"}
        assert torch.equal(example.extras["pixel_values"], pixels(processor, *shown))
    else:
        assert not example.extras


@pytest.mark.parametrize("template, text", [("none", "<image>what?"), ("alpaca", "### Instruction:\n<image>what?\n")])
def test_without_a_chat_template_the_token_stands_before_the_text(processor, files, template, text):
    (files / "data.jsonl").write_text(json.dumps({"prompt": "what?", "image": "1.png"}) + "\n")
    (example,) = read(processor, files / "data.jsonl", template=template)
    assert text in example.prompt


def test_columns_of_parquet_files_and_datasets(processor, tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Column

    rows = {
        "prompt": ["what?", "why?"],
        "images": [[{"bytes": encoded(1), "path": None}], [{"bytes": encoded(2), "path": None}]],
    }
    features = Features({"prompt": Value("string"), "images": List(Column())})
    dataset = Dataset.from_dict(rows, features=features)
    dataset.to_parquet(str(tmp_path / "data.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    single = Dataset.from_dict(
        {"prompt": ["what?"], "image": [{"bytes": encoded(1), "path": None}]},
        features=Features({"prompt": Value("string"), "image": Column()}),
    )
    single.save_to_disk(str(tmp_path / "single"))
    for keys, shown in (
        (ParquetPrompts(type="parquet", path=str(tmp_path / "data.parquet"), template="chat"), [1, 2]),
        (HfPrompts(type="hf", path=str(tmp_path / "saved"), template="chat"), [1, 2]),
        (HfPrompts(type="hf", path=str(tmp_path / "single"), template="chat"), [1]),
    ):
        found = load_prompts(keys, processor.tokenizer)
        assert len(found) == found.pictured == len(shown)
        for example, number in zip(found, shown, strict=True):
            assert torch.equal(example.extras["pixel_values"], pixels(processor, number))


def test_pixels_are_made_again_when_there_is_no_room_to_keep_them(processor, files, monkeypatch):
    monkeypatch.setattr(images, "KEPT_BYTES", 1)
    lines = [json.dumps({"prompt": "what?", "image": f"{number}.png"}) for number in range(3)]
    (files / "data.jsonl").write_text("\n".join(lines) + "\n")
    found = read(processor, files / "data.jsonl")
    for _ in range(2):
        for number, example in enumerate(found):
            assert torch.equal(example.extras["pixel_values"], pixels(processor, number))


def test_a_turned_photograph_is_looked_at_as_a_person_does(processor, tmp_path):
    image, exif = picture(5, 20, 60), Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image.save(tmp_path / "turned.png", exif=exif)
    shown = images.find_pictures("here", tmp_path, {"image": "turned.png"})[0].open(10**6)
    assert shown.size == (60, 20) and shown.mode == "RGB"


CUT = encoded(1, width=90, height=90)
CUT = CUT[: len(CUT) // 2]
WRONG = {
    "missing": ({"image": "none.png"}, "picture .*none.png: no such file"),
    "no picture": ({"image": "text.png"}, "picture .*text.png: not a picture that Pillow knows"),
    "cut off": ({"image": "cut.png"}, "picture .*cut.png: cannot be read"),
    "a folder": ({"image": "."}, "picture .*: cannot be read"),
    "too large": ({"image": "large.png"}, "picture .*large.png: 120 x 100 pixels, more than max_image_pixels=10,000"),
    "not base64": ({"image": "data:image/png;base64,%%"}, "a data: URI that is not base64"),
    "data without base64": ({"image": "data:image/png,abc"}, "a data: URI without base64"),
    "an address": ({"image": "https://example.org/a.png"}, "is an address, and nothing is fetched"),
    "a number": ({"images": [5]}, "expected a path, a data: URI or the bytes of a picture, found int"),
    "too few places": ({"prompt": "<image>", "images": ["1.png", "2.png"]}, "2 pictures in image or images, but 1 places"),
    "a part of nothing": ({"messages": [{"role": "user", "content": [part()]}]}, "0 pictures .* but 1 places"),
    "a part of another type": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "must be of type text or image"),
    "an answer that shows one": (
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": [part(path="1.png")]}]},
        "the answer shows a picture",
    ),
    "a placeholder without a picture": ({"prompt": "what is <image>?"}, "stands for a picture .* and it shows none"),
    "a placeholder in the answer": ({"prompt": "?", "completion": "an <image>", "image": "1.png"}, "its answer says what stands for"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_shown_is_named_with_its_record_and_file(processor, files, case):
    (files / "text.png").write_text("no picture")
    (files / "cut.png").write_bytes(CUT)
    (files / "large.png").write_bytes(encoded(0, width=120, height=100))
    record, said = WRONG[case]
    lines = [json.dumps({"prompt": "?", "image": "1.png"}), json.dumps({"prompt": "what?", **record})]
    (files / "data.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=said) as found:
        read(processor, files / "data.jsonl", max_image_pixels=10_000)
    assert str(found.value).startswith(f"{files / 'data.jsonl'}:2: ")


def test_a_picture_that_the_processor_refuses_is_named(files):
    """Qwen2-VL takes no strip whose sides differ by more than two hundred times."""
    (files / "strip.png").write_bytes(encoded(0, width=900, height=2))
    (files / "data.jsonl").write_text(json.dumps({"prompt": "?", "image": "strip.png"}) + "\n")
    with pytest.raises(DataError, match=r"data\.jsonl:1: the model's processor refuses .*strip\.png"):
        read(build_processor("qwen2_vl"), files / "data.jsonl")


def test_a_text_model_given_pictures_is_refused(files):
    (files / "data.jsonl").write_text(json.dumps({"prompt": "?", "image": "1.png"}) + "\n")
    with pytest.raises(DataError, match=r":1: it shows 1 pictures, and the tokenizer belongs to a model of text alone"):
        load_prompts(JsonlPrompts(path=str(files / "data.jsonl"), template="none"), byte_tokenizer())


def test_questions_of_a_classification_show_none(processor, files):
    (files / "data.jsonl").write_text(json.dumps({"q": "?", "l": 0, "image": "1.png"}) + "\n")
    labels = JsonlLabels(path=str(files / "data.jsonl"), question="{q}", label="l", words=["a", "b"], template="none")
    with pytest.raises(DataError, match=r":1: it shows pictures, which questions of yes cannot"):
        load_labels(labels, processor.tokenizer, name="yes")


def test_prompts_are_counted_with_the_parts_of_their_pictures(processor, files):
    (files / "data.jsonl").write_text(json.dumps({"prompt": "?", "image": "1.png"}) + "\n")
    length = len(read(processor, files / "data.jsonl")[0].prompt_ids)
    with pytest.raises(DataError, match=f"all 1 are over max_prompt_length={length - 1}"):
        read(processor, files / "data.jsonl", max_prompt_length=length - 1)


def test_two_models_must_see_the_same_pictures(processor, files):
    lines = [json.dumps({"prompt": "?", "image": "1.png"}), json.dumps({"prompt": "?"})]
    (files / "data.jsonl").write_text("\n".join(lines) + "\n")
    sets = {"data.prompts": read(processor, files / "data.jsonl")}
    ours, other = processor.tokenizer, build_processor("llava")
    require_shared_pictures(sets, ours, [other.tokenizer])
    require_shared_pictures(sets, ours, [])
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(DataError, match="data.prompts: .* prepare them differently .*image_mean is"):
        require_shared_pictures(sets, ours, [other.tokenizer])
    with pytest.raises(DataError, match="the teacher reads text alone"):
        require_shared_pictures(sets, ours, [byte_tokenizer()])
    with pytest.raises(DataError, match="1 of 2 prompts show pictures; on several ranks all must, or none"):
        require_shared_pictures(sets, ours, [], ranks=2)
    (files / "data.jsonl").write_text(lines[1] + "\n")
    require_shared_pictures({"data.prompts": read(processor, files / "data.jsonl")}, ours, [byte_tokenizer()], ranks=2)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_damaged_exif_is_an_error_that_names_the_picture(form):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    whole = turned.tobytes()
    for exif in (whole, *(whole[:length] for length in range(6, len(whole)))):
        file = io.BytesIO()
        Image.new("RGB", (8, 4)).save(file, form, exif=exif)
        picture = Picture("data.jsonl:1", "turned", file.getvalue)
        for look in (picture.size, lambda picture=picture: picture.open(100).size):
            try:
                assert look() in ((4, 8), (8, 4))
            except DataError as error:
                assert "data.jsonl:1: picture turned: cannot be read" in str(error)
                assert exif != whole
