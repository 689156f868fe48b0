"""The cases of `minillm bench plan`, and the configuration of each."""

from dataclasses import dataclass, replace
from pathlib import Path

from minillm.benchmarks.plan_pictures import seeing_architecture

STEPS = 3
PROMPT, ANSWER = 48, 64
SFT, KD, GKD = {"name": "sft"}, {"name": "kd"}, {"name": "gkd", "on_policy": 1.0}
OKD = {"name": "okd", "lora": {"r": 16, "alpha": 32}}
LLAVADI = {"name": "llavadi", "standardize": True, "features_coef": 0.0}
MINILLM = {"name": "minillm", "ppo_epochs": 2}
UNMIXED = {**MINILLM, "alpha": 0.0}


@dataclass(frozen=True)
class Case:
    """One line of the table. The teacher, where there is one, is the student with `teacher_layers`."""

    name: str
    family: str
    method: dict  # its keys
    hidden: int
    layers: int
    vocab: int
    teacher_layers: int | None
    batch: int
    accumulation: int = 1
    checkpointing: bool = False
    bf16: bool = False
    prompt: int = PROMPT
    answer: int = ANSWER
    coins: bool = False  # rollout.shared_coins
    quantization: str | None = None  # of the teacher
    evaluated: int = 0  # answers side by side in an evaluation after every step; 0: none
    second_layers: int | None = None  # of a second teacher
    divided: bool = False  # the two have a half of the records each; otherwise both judge all
    ranks: int = 0  # of ZeRO-3, weights gathered layer by layer; 0 is the engine of one process
    side: int = 0  # pixels of the square picture that every prompt shows; 0: it shows none
    part: str | None = None  # the one part of the student that is trained; None: all


CASES = (
    Case("sft", "llama", SFT, 512, 6, 8000, None, batch=8),
    Case("sft, checkpointing", "llama", SFT, 512, 12, 8000, None, batch=16, checkpointing=True),
    Case("sft, gpt2, accumulation", "gpt2", SFT, 512, 6, 16000, None, batch=8, accumulation=2),
    Case("sft, mixture of experts", "qwen3_moe", SFT, 384, 4, 8000, None, batch=8),
    Case("kd, large vocabulary", "qwen2", KD, 384, 6, 60000, 10, batch=8),
    Case("kd, bf16", "llama", KD, 384, 6, 8000, 8, batch=4, bf16=True),
    Case("kd, teacher in nf4", "llama", KD, 384, 6, 8000, 24, batch=8, quantization="nf4"),
    Case("minillm, teacher in int8", "llama", MINILLM, 384, 6, 8000, 24, batch=8, quantization="int8"),
    Case("okd", "llama", OKD, 384, 6, 8000, 10, batch=8),
    Case("gkd, opt", "opt", GKD, 512, 6, 16000, 8, batch=8),
    Case("llavadi, standardised logits", "llama", LLAVADI, 384, 4, 32000, 6, batch=8),
    Case("kd, two teachers", "llama", KD, 384, 6, 16000, 8, batch=8, second_layers=10),
    Case(
        "minillm, two teachers by a field", "llama", UNMIXED, 384, 6, 16000, 8, batch=8, second_layers=10, divided=True
    ),
    Case("minillm", "llama", MINILLM, 512, 6, 16000, 10, batch=8),
    Case("minillm, long answers", "gpt2", MINILLM, 384, 6, 16000, 10, batch=8, answer=144),
    Case("minillm, shared coins", "llama", MINILLM, 512, 6, 16000, 10, batch=8, coins=True),
    Case("minillm, shared coins, long answers", "gpt2", MINILLM, 384, 6, 16000, 10, batch=8, answer=144, coins=True),
    Case("minillm, checkpointing", "qwen2", MINILLM, 512, 8, 16000, 10, batch=8, checkpointing=True),
    Case("sft, evaluated", "llama", SFT, 512, 6, 16000, None, batch=2, evaluated=64),
    Case("minillm, evaluated", "llama", MINILLM, 384, 6, 16000, 10, batch=2, evaluated=128),
    Case("kd, pictures", "llava", KD, 384, 4, 8000, 6, batch=8, prompt=160, side=168),
    Case("sft, pictures, projector alone", "llava", SFT, 384, 4, 8000, None, 8, prompt=80, side=112, part="projector"),
    Case("minillm, pictures", "llava", MINILLM, 384, 4, 8000, 6, batch=8, prompt=80, side=112),
    Case("kd, pictures in patches", "qwen2_vl", KD, 384, 4, 8000, 6, batch=8, prompt=160, side=336),
    Case("sft, pictures in windows", "qwen2_5_vl", SFT, 384, 4, 8000, None, batch=8, prompt=160, side=336),
    Case("minillm, pictures at three depths", "qwen3_vl", MINILLM, 384, 4, 8000, 6, batch=8, prompt=160, side=336),
    Case("kd, pictures in tiles", "idefics3", KD, 384, 4, 8000, 6, batch=4, prompt=96, side=336),
    Case("minillm, pictures in tiles", "llava_onevision", MINILLM, 384, 4, 8000, 6, batch=4, prompt=208, side=168),
    *(
        Case(f"minillm, ZeRO-3, ranks: {ranks}", "llama", MINILLM, 512, 8, 8000, 12, 2, ranks=ranks)
        for ranks in (1, 2, 4)
    ),
)


def architecture(case: Case, layers: int) -> dict:
    """Return the keys of the transformers configuration."""
    h, heads, context = case.hidden, case.hidden // 64, 1024
    if case.side:
        text = architecture(replace(case, side=0), layers)
        return seeing_architecture(case.family, h, heads, case.side, text)
    if case.family == "gpt2":
        own = {"n_embd": h, "n_layer": layers, "n_head": heads, "n_positions": context}
    elif case.family == "opt":
        own = {"hidden_size": h, "ffn_dim": 4 * h, "num_hidden_layers": layers, "num_attention_heads": heads,
               "word_embed_proj_dim": h, "max_position_embeddings": context}  # fmt: skip
    else:
        own = {"hidden_size": h, "intermediate_size": 3 * h, "num_hidden_layers": layers, "num_attention_heads": heads,
               "num_key_value_heads": max(1, heads // 2), "max_position_embeddings": context}  # fmt: skip
    if case.family == "qwen3_moe":
        own |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": h, "head_dim": 64}
    return {"model_type": case.family, "vocab_size": case.vocab, "tie_word_embeddings": case.family != "llama", **own}


def student_keys(case: Case, layers: int, folder: Path) -> dict:
    """The keys of a model with fresh weights, which for one that sees pictures are a folder that is written."""
    keys = architecture(case, layers)
    if not case.side:
        return {"init": "random", "tokenizer": "byte", "config": keys}
    from transformers import AutoConfig

    from minillm.models.tokenizers import byte_tokenizer

    AutoConfig.for_model(**keys).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)  # and no processor for both: pictures are made, not read
    return {"init": "random", "path": str(folder)}


def document(case: Case, folder: Path) -> dict:
    """Return the configuration, with the teacher's config.json written into the folder."""
    from PIL import Image
    from transformers import AutoConfig

    from minillm.config.root import method_class

    layers = {"teacher": case.teacher_layers, "second": case.second_layers}
    teachers = {}
    for name, count in layers.items():
        if count is not None:
            teachers[name] = {"path": str(folder / name), "quantization": case.quantization}
            AutoConfig.for_model(**architecture(case, count)).save_pretrained(folder / name)
    several = len(teachers) > 1
    text = folder / "corpus.txt"
    text.write_text("plain text")
    prompts = {"type": "pydoc", "max_prompt_length": case.prompt, "max_response_length": case.answer}
    if case.side:
        prompts |= {"type": "jsonl", "path": str(folder / "shown.jsonl")}
        Image.new("RGB", (case.side, case.side)).save(folder / "one.png")
        (folder / "shown.jsonl").write_text('{"prompt": "which", "completion": "this", "image": "one.png"}\n')
    evaluation = {"sets": {"held_out": prompts}, "batch_size": case.evaluated, "max_new_tokens": case.answer}
    needs = method_class(case.method["name"]).model_validate(case.method).needs()
    corpus = {"path": str(text), "block_size": case.prompt + case.answer} if needs.corpus else None
    return {
        "output_dir": str(folder / "run"),
        "student": {**student_keys(case, case.layers, folder / "student"), "train": case.part and [case.part]},
        **({"teachers": teachers, "teachers_by": by(case)} if several else {"teacher": teachers.get("teacher")}),
        "data": {"prompts": prompts, "corpus": corpus},
        "rollout": {
            "buffer_size": 4 * case.batch,
            "batch_size": 2 * case.batch,
            "max_new_tokens": case.answer,
            "shared_coins": case.coins,
        },
        "method": case.method,
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": case.batch,
            "gradient_accumulation_steps": case.accumulation,
            "gradient_checkpointing": case.checkpointing,
            "bf16": case.bf16,
        },
        "eval": evaluation if case.evaluated else {},
        "engine": {"type": "deepspeed", "stage": 3, "gather": "layers"}
        if case.ranks
        else {"type": "torch", "device": "cpu"},
    }


def by(case: Case) -> dict:
    """Return the way in which two teachers divide the records."""
    return {"field": "domain"} if case.divided else {"weights": {"teacher": 0.5, "second": 0.5}}


def load(case: Case, folder: Path):
    """Load the one-stage configuration."""
    import yaml

    from minillm.config.loader.run_plan import load_run

    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(document(case, folder)))
    return load_run([file])
