"""Out to transformers and in from there: the same numbers, the same text, the same conversations."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from torch import Tensor

from engine import checkpoint
from engine.chat_template import JINJA, OLD_JINJA, PLAIN_JINJA, Message, answer_prompt, render, text_ends
from engine.config import BudgetConfig, ModelConfig, OptimizerConfig, Recipe
from engine.errors import InputError
from engine.generate import document_prompt, generate
from engine.huggingface import export, import_
from engine.model import GPT
from engine.run import Run
from engine.runtime import choose
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from tests.engine.test_tokenizer_json import neox_like
from train.optimizer import Optimizer

transformers: Any = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
CPU = choose("cpu", "fp32")
GREEDY = Sampling(temperature=0)
CONVERSATION = [Message("system", "Be  brief."), Message("user", "A fox?\n"), Message("assistant", " Yes. ")]
VARIANTS = [
    {"use_parallel_residual": parallel, "rotary_pct": share, "attention_bias": bias}
    for parallel, share, bias in ((True, 0.25, True), (False, 1.0, True), (True, 1.0, False), (False, 0.25, False))
]


def randomise(model: torch.nn.Module) -> None:
    """Biases and norms that hide nothing, and weights so large that the choices are far apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm.weight" in name else 0.0, std=0.3)


def neox(folder: Path, documents: tuple[str, ...], *, rows: int = 384, **changes: Any) -> Any:
    """A randomly initialised GPT-NeoX model with its tokenizer, as transformers saves them."""
    config = transformers.GPTNeoXConfig(
        vocab_size=rows, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=48, bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.GPTNeoXForCausalLM(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    neox_like(documents).save(str(folder / "tokenizer.json"))
    return model


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def logits(model: GPT, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens))


@pytest.fixture(params=[{}, {"parallel_residual": True, "rotary_share": 0.5, "biases": True}], ids=["ours", "neox"])
def run(request: pytest.FixtureRequest, tokenizer: Tokenizer, small_config: ModelConfig, tmp_path: Path) -> Run:
    """A chat model of random weights."""
    config = dataclasses.replace(small_config, **request.param)
    model = GPT(config)
    randomise(model)
    run = Run(tmp_path / "run")
    run.write_recipe(Recipe(name="small", model=config, budget=BudgetConfig(steps=1), chat=True))
    tokenizer.save(run.tokenizer)
    checkpoint.save(run.checkpoints, 1, {"model": model.state_dict()}, {})
    return run


def test_an_exported_model_computes_the_same_in_transformers(run: Run, tmp_path: Path) -> None:
    files = export(run, tmp_path / "out")
    assert len({path.stat().st_mode for path in files}) == 1
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, _ = run.load_model(CPU)
    tokens = torch.randint(model.config.vocab_size, (3, model.config.context))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_an_exported_model_says_the_same_in_transformers(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    model, tokenizer = run.load_model(CPU)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompts = [" The fox said  ", "A", "Once upon a time there was a hat.\n"]
    starts = [document_prompt(tokenizer, prompt) for prompt in prompts]
    ends = text_ends(tokenizer, chat=True)
    said = [each.ids for each in generate(model, tokenizer, starts, GREEDY, max_tokens=16, stop_ids=ends)]
    assert min(len(set(ids)) for ids in said) >= 3
    # As its documentation does it: a text alone, and texts of several lengths together.
    for texts in (prompts[:1], prompts):
        batch = their_tokenizer(texts, return_tensors="pt", padding=True)
        produced = theirs.generate(**batch, do_sample=False, max_new_tokens=16)[:, batch.input_ids.shape[1] :].tolist()
        assert [tuple(ids[: len(ours)]) for ids, ours in zip(produced, said, strict=False)] == said[: len(texts)]
    assert [ids[mask.bool()].tolist() for ids, mask in zip(*batch.values(), strict=True)] == starts


def test_an_export_is_spelled_for_old_versions_too(run: Run, tmp_path: Path) -> None:
    """What 4.48 and 4.57 need, tried by bench/compatibility.sh: they make token types, and know no rope_parameters."""
    export(run, tmp_path / "out")
    read = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*config.json")}
    assert read["tokenizer_config.json"]["model_input_names"] == ["input_ids", "attention_mask"]
    config, rope = read["config.json"], read["config.json"]["rope_parameters"]
    assert (config["rotary_pct"], config["rotary_emb_base"]) == (rope["partial_rotary_factor"], rope["rope_theta"])
    assert config["torch_dtype"] == "float32"
    assert config["pad_token_id"] == read["generation_config.json"]["pad_token_id"] == Tokenizer.load(run.path).eod


def test_an_exported_tokenizer_is_ours(run: Run, documents: tuple[str, ...], tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    ours, theirs = Tokenizer.load(run.path), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (*documents, "  a \u2581 b\n\n\U0001f642 \0 1234"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    spelled = theirs("<|end|>", add_special_tokens=False, split_special_tokens=True).input_ids
    assert spelled == ours.encode("<|end|>")
    assert len(theirs) == ours.vocab_size


def test_the_chat_template_gives_the_ids_that_ours_gives(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    ours, theirs = Tokenizer.load(run.path), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [dataclasses.asdict(message) for message in CONVERSATION]
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ids == render(ours, CONVERSATION)[0]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == answer_prompt(ours, CONVERSATION)
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends == [ours.eod, ours.special["<|end|>"]]


def test_the_chat_template_takes_what_our_api_takes(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    ours, theirs = Tokenizer.load(run.path), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    parts = [{"type": "text", "text": text} for text in ("A ", "\U0001f642?\n")]
    messages = [{"role": "developer", "content": "Be  brief."}, {"role": "user", "content": parts}]
    expected = [Message("system", "Be  brief."), Message("user", "A \U0001f642?\n")]
    assert theirs.apply_chat_template(messages, return_dict=False) == render(ours, expected)[0]
    for message, reason in (
        ({"role": "tool", "content": "4"}, "role must be one of"),
        ({"role": "user", "content": [*parts, {"type": "image", "url": "a.png"}]}, "must be of type text"),
    ):
        with pytest.raises(Exception, match=reason):
            theirs.apply_chat_template([message])


def test_the_chat_template_marks_what_is_learnt(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    ours, theirs = Tokenizer.load(run.path), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    said = ("", " Yes. ", "\U0001f642\u4e2d na\u00efve", "\n")
    conversation = [message for text in said for message in (Message("user", text), Message("assistant", text))]
    marked = theirs.apply_chat_template(
        [dataclasses.asdict(message) for message in conversation], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, learn = render(ours, conversation)
    assert marked["input_ids"] == ids and [bool(mark) for mark in marked["assistant_masks"]] == learn


def test_the_template_without_marks_is_read_by_any_jinja(run: Run, tmp_path: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    export(run, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [dataclasses.asdict(message) for message in CONVERSATION]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    plain = jinja2.Environment().from_string(PLAIN_JINJA)
    assert plain.render(messages=messages, add_generation_prompt=True) == expected
    with pytest.raises(jinja2.TemplateSyntaxError, match="generation"):
        jinja2.Environment().from_string(JINJA)


@pytest.mark.parametrize("template", [JINJA, PLAIN_JINJA, OLD_JINJA, "{{ messages[0].content }}"])
def test_a_chat_model_is_known_by_its_template(run: Run, template: str, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text(template)
    assert import_(tmp_path / "out", tmp_path / "back").chat == ("generation_prompt" in template)


def test_a_base_model_has_no_chat_template_and_ends_with_its_document(run: Run, tmp_path: Path) -> None:
    run.write_recipe(dataclasses.replace(run.read_recipe(), chat=False))
    export(run, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends == Tokenizer.load(run.path).eod


def test_an_export_comes_back_as_it_was(run: Run, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    recipe = import_(tmp_path / "out", tmp_path / "back")
    assert recipe.model == dataclasses.replace(run.read_recipe().model, family="gpt_neox") and recipe.chat
    ours, tokenizer = run.load_model(CPU)
    back, their_tokenizer = Run(tmp_path / "back").load_model(CPU)
    tokens = torch.randint(ours.config.vocab_size, (2, 20))
    assert torch.equal(logits(ours, tokens), logits(back, tokens))
    assert their_tokenizer.special == tokenizer.special
    assert render(their_tokenizer, CONVERSATION) == render(tokenizer, CONVERSATION)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_an_imported_model_computes_the_same(
    variant: dict[str, Any], documents: tuple[str, ...], tmp_path: Path
) -> None:
    theirs = neox(tmp_path / "neox", documents, **variant)
    import_(tmp_path / "neox", tmp_path / "run")
    model, _ = Run(tmp_path / "run").load_model(CPU)
    assert model.config.parallel_residual == variant["use_parallel_residual"]
    assert model.config.rotary_dim == 16 * variant["rotary_pct"]
    assert model.config.parameters == sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(384, (3, 48))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    # And goes out again.
    export(Run(tmp_path / "run"), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS[:2], ids=str)
def test_an_imported_model_says_the_same(variant: dict[str, Any], documents: tuple[str, ...], tmp_path: Path) -> None:
    theirs = neox(tmp_path / "neox", documents, **variant)
    import_(tmp_path / "neox", tmp_path / "run")
    model, tokenizer = Run(tmp_path / "run").load_model(CPU)
    prompts = [document_prompt(tokenizer, text) for text in ("The fox", "", '"Where is    my hat?" asked')]
    # Together, so that each is at another place in the cache.
    for prompt, ours in zip(prompts, generate(model, tokenizer, prompts, GREEDY, max_tokens=20), strict=True):
        ids = torch.tensor([prompt])
        produced = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        expected = produced[0, len(prompt) :].tolist()
        assert list(ours.ids) == [token for token in expected if token != tokenizer.eod] and len(ours.ids) > 5


def test_an_imported_model_learns(documents: tuple[str, ...], tmp_path: Path) -> None:
    neox(tmp_path / "neox", documents, attention_bias=True)
    import_(tmp_path / "neox", tmp_path / "run")
    model, tokenizer = Run(tmp_path / "run").load_model(CPU)
    optimizer = Optimizer(model, OptimizerConfig(), matmul_dtype=torch.float32)
    sequences = [document_prompt(tokenizer, text)[:40] for text in documents[:4]]
    tokens = torch.tensor([token for ids in sequences for token in ids[:-1]])
    targets = torch.tensor([token for ids in sequences for token in ids[1:]])
    lengths = torch.tensor([0, *(len(ids) - 1 for ids in sequences)])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(3):
        loss = model.loss(tokens, targets, cu_seqlens=lengths.cumsum(0).int())
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_tokens_without_a_row_get_one_of_their_own_like_the_others(documents: tuple[str, ...], tmp_path: Path) -> None:
    own = neox_like(documents).get_vocab_size()
    theirs = neox(tmp_path / "neox", documents, rows=own + 1)
    assert import_(tmp_path / "neox", tmp_path / "run").model.vocab_size == own + 4
    model, tokenizer = Run(tmp_path / "run").load_model(CPU)
    assert tokenizer.vocab_size == own + 4
    tokens = torch.randint(own, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens)[..., : own + 1], theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    # Where adapters learn in place of these rows, tokens with the same row would be as likely as each other for ever.
    old, new = theirs.lm_head.weight, model.head_weight[own + 1 :]
    assert len(new) == len(new.unique(dim=0)) == 3
    assert (new - old.mean(0)).abs().le(6 * old.std(0)).all() and 0.5 < float(new.std() / old.std()) < 2
    # Without having learnt to chat it goes out as it came; a chat model takes them along.
    (tmp_path / "neox" / "chat_template.jinja").write_text(JINJA)
    assert import_(tmp_path / "neox", tmp_path / "chat").chat
    for name, rows in (("run", own + 1), ("chat", own + 4)):
        export(Run(tmp_path / name), tmp_path / f"out-{rows}")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{rows}")
        assert again.config.vocab_size == len(again.lm_head.weight) == rows
        assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / f"out-{rows}")) == rows


def test_weights_in_several_files_and_of_old_and_tied_models_are_read(
    documents: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "neox"
    theirs = neox(folder, documents, tie_word_embeddings=True).half()
    (folder / "model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    # What Pythia's config.json says, and where.
    settings(folder, rope_parameters=None, rotary_pct=0.25, rotary_emb_base=10000, rope_scaling=None)
    assert import_(folder, tmp_path / "run").model.rotary_share == 0.25
    model, _ = Run(tmp_path / "run").load_model(CPU)
    assert model.config.tied
    tokens = torch.randint(384, (2, 20))
    # Read anew: a cast to fp16 and back rounds their rotary frequencies, too.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'.*'gpt_neox', 'llama'"),
        ({"hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast'.*'gelu'"),
        ({"intermediate_size": 100}, r"dense_h_to_4h\.weight is \(256, 64\); by config.json it is \(100, 64\)"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"num_attention_heads": "four"}, "heads is 'four'"),
        ({"rotary_pct": 0.2, "rope_parameters": None}, r"rotary_share 0\.2 rotates 3 of a head's 16"),
        ({"num_hidden_layers": 3}, r"gpt_neox\.layers\.2\.\S+ is missing; by config.json it is \(64,\)"),
        ({"num_hidden_layers": 10**6}, "blocks is 1000000; it must be at least 1 and at most 1000"),
        ({"rope_scaling": [1], "rope_parameters": None}, r"rope_scaling \[1\]; they must be an object"),
        ({"hidden_size": None}, "hidden_size None; it must be a whole number"),
        ({"vocab_size": 400}, r"gpt_neox\.embed_in\.weight is \(384, 64\); by config.json it is \(400, 64\)"),
    ],
    ids=str,
)
def test_what_the_model_cannot_be_is_refused_by_name(
    documents: tuple[str, ...], changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    neox(tmp_path / "neox", documents)
    settings(tmp_path / "neox", **changes)
    with pytest.raises(InputError, match=expected):
        import_(tmp_path / "neox", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_pickle_is_not_read(documents: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "neox"
    neox(folder, documents)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        import_(folder, tmp_path / "run")
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        import_(folder, tmp_path / "run")


def test_odd_files_beside_a_model_are_read_or_refused_by_name(documents: tuple[str, ...], tmp_path: Path) -> None:
    folder, weights = tmp_path / "neox", tmp_path / "neox" / "model.safetensors"
    neox(folder, documents)
    tensors = safetensors.load_file(weights)

    def refused(expected: str) -> None:
        with pytest.raises(InputError, match=expected):
            import_(folder, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    for bad in (torch.full_like(tensors[name], torch.nan), torch.full_like(tensors[name], 1e300, dtype=torch.float64)):
        safetensors.save_file(tensors | {name: bad}, weights)
        refused(rf"the tensor {name} holds NaN, infinity")
    safetensors.save_file(tensors | {name: torch.ones_like(tensors[name], dtype=torch.int8)}, weights)
    refused(rf"the tensor {name} holds")
    safetensors.save_file(tensors, weights)
    safetensors.save_file({name: tensors[name]}, folder / "model.fp16.safetensors")
    refused(rf"model\.safetensors and another file both hold the tensor {name}")
    (folder / "model.fp16.safetensors").unlink()
    (folder / "model-2.safetensors").mkdir()
    refused(r"model-2\.safetensors is damaged")
    (folder / "model-2.safetensors").rmdir()
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    kept = (folder / "config.json").read_text()
    (folder / "config.json").write_text("[" * 100_000)
    refused(r"cannot read .*config\.json")
    (folder / "config.json").write_text(kept)
    assert not import_(folder, tmp_path / "run").chat


def test_the_product_imports_transformers_to_render_another_models_chat_template_alone() -> None:
    sources = [path for folder in ("kernels", "engine", "train", "cli") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    lines = {
        path.relative_to(ROOT): re.findall(r"^\s*(?:import|from) transformers.*", path.read_text(), re.M)
        for path in sources
    }
    ((where, (line,)),) = ((path, found) for path, found in lines.items() if found)
    assert str(where) == "engine/chat_template.py" and line.startswith("        ")  # in a function
    assert line.strip() == "from transformers.utils.chat_template_utils import render_jinja_template"
