"""Compressed models as plain layers, and as folders that load without this package."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tiny_models import save_decoder, save_encoder, save_tokenizer
from torch import Tensor, nn

from lightning_peft import Factorized, RankBudget, inject
from lightning_peft.interop import plain as plain_module
from lightning_peft.interop.plain import save_compressed, thin_layers, to_plain
from lightning_peft.surgery import adapters

ALONE = "import sys\nsys.modules['lightning_peft'] = None\n"


def cut(model: nn.Module, rank: int = 3, but: str = "", targets: list[str] | None = None) -> dict[str, int]:
    """Factorise, and leave `rank` components in every layer but one."""
    inject(model, Factorized, targets, [])
    for name, site in RankBudget.of(model).items():
        if name != but:
            site.gate.keep(torch.arange(len(site.gate)) < rank)
    return RankBudget.of(model).ranks()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def run_alone(source: str, *arguments: str) -> None:
    """Run a program in a process that cannot import this package."""
    run = subprocess.run([sys.executable, "-c", ALONE + source, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- transformers models, written once --------------------------------------------------------------------------------

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An encoder with one dense layer, a base encoder, and a tied decoder: compressed, saved, and what they return."""
    place = tmp_path_factory.mktemp("written")
    ids = torch.tensor([[2, 8, 5, 10, 3], [2, 8, 4, 9, 3]])
    encoder = hf.AutoModelForSequenceClassification.from_pretrained(save_encoder(place / "dense-encoder"))
    ranks = cut(encoder, but=QUERY)
    decoder = hf.AutoModelForCausalLM.from_pretrained(save_decoder(place / "dense-decoder"))
    cut(decoder, rank=2)
    export = save_compressed(encoder, place / "encoder", beside=lambda folder: save_tokenizer(folder, classifies=True))
    save_compressed(decoder, place / "decoder")
    outputs = {"encoder": logits(encoder, ids), "decoder": logits(decoder, ids)}
    with torch.no_grad():
        outputs["base"] = encoder.bert.eval()(input_ids=ids).last_hidden_state
    save_file({"ids": ids, **outputs}, place / "wanted.safetensors")
    return SimpleNamespace(place=place, encoder=encoder, decoder=decoder, export=export, ranks=ranks, ids=ids)


PROGRAM = """
import torch, transformers
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

place = Path(sys.argv[1])
wanted = load_file(place / "wanted.safetensors")
ids = wanted.pop("ids")
loaded = {}
with torch.no_grad():
    for auto, folder, kind in (
        (AutoModelForSequenceClassification, "encoder", "encoder"),
        (AutoModelForCausalLM, "decoder", "decoder"),
        (AutoModel, "encoder", "base"),
    ):
        model = loaded[kind] = auto.from_pretrained(place / folder, trust_remote_code=True)
        outputs = model.eval()(input_ids=ids)
        got = outputs.last_hidden_state if kind == "base" else outputs.logits
        torch.testing.assert_close(got, wanted[kind], rtol=0, atol=1e-5)
encoder, decoder = loaded["encoder"], loaded["decoder"]
assert isinstance(encoder, transformers.BertForSequenceClassification)
key = encoder.bert.encoder.layer[0].attention.self.key
assert [type(layer) for layer in key] == [torch.nn.Linear] * 2 and key.down.bias is None
assert type(encoder.bert.encoder.layer[0].attention.self.query) is torch.nn.Linear
assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
generated = decoder.generate(ids[:1, 1:3], max_new_tokens=3, do_sample=False)
assert generated.shape[1] == 5
say = pipeline("text-classification", model=encoder, tokenizer=AutoTokenizer.from_pretrained(place / "encoder"))
assert say("the green tree")[0]["label"].startswith("LABEL_")
encoder.save_pretrained(place / "again")
for auto in (AutoModelForSequenceClassification, AutoModel):
    try:
        auto.from_pretrained(place / "encoder", trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("a folder of thin layers was loaded without them")
"""


def test_it_loads_without_this_package(written: SimpleNamespace, tmp_path: Path, monkeypatch: Any) -> None:
    """One process loads all of them, by each auto class; without the folder's code it is refused, not filled up."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    run_alone(PROGRAM, str(written.place))


def test_the_module_is_as_it_was(written: SimpleNamespace) -> None:
    assert len(adapters(written.encoder)) == len(written.ranks) == 12


def test_what_was_written_is_what_is_said(written: SimpleNamespace) -> None:
    config = json.loads((written.place / "encoder" / "config.json").read_text())
    wanted = {name: rank for name, rank in written.ranks.items() if name != QUERY}
    assert config["thin_layers"] == wanted == dict(written.export.ranks)
    assert config["model_type"] == "compressed-bert"
    tensors = load_file(written.place / "encoder" / "model.safetensors")
    assert tensors["bert.encoder.layer.1.output.dense.down.weight"].shape == (3, 32)
    assert tensors["bert.encoder.layer.1.output.dense.up.weight"].shape == (16, 3)
    assert "bert.encoder.layer.1.output.dense.down.bias" not in tensors
    assert tensors[f"{QUERY}.weight"].shape == (16, 16)
    assert "layers: 11 with ranks 3 to 3, 33 components" in str(written.export)
    assert "process without this package" in str(written.export)
    assert "head: left out" not in str(written.export)
    assert written.export.bytes == (written.place / "encoder" / "model.safetensors").stat().st_size


def test_tied_embeddings_are_written_once(written: SimpleNamespace) -> None:
    tensors = load_file(written.place / "decoder" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head" not in written.decoder.config.to_json_string()


# --- to_plain ---------------------------------------------------------------------------------------------------------


def test_plain_layers_do_the_same(written: SimpleNamespace) -> None:
    model = copy.deepcopy(written.encoder)
    before = logits(model, written.ids)
    ranks = to_plain(model)
    assert not adapters(model)
    assert ranks == thin_layers(model) == {name: 3 for name in written.ranks if name != QUERY}
    torch.testing.assert_close(logits(model, written.ids), before, rtol=0, atol=1e-5)


def test_what_was_trainable_is_again(tmp_path: Path) -> None:
    model = hf.AutoModelForSequenceClassification.from_pretrained(save_encoder(tmp_path / "encoder"))
    model.bert.embeddings.requires_grad_(False)
    cut(model)
    assert not any(p.requires_grad for p in model.classifier.parameters())
    to_plain(model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        f"bert.embeddings.{name}" for name, _ in model.bert.embeddings.named_parameters()
    }


class Net(nn.Module):
    """A convolution, an attention, a linear layer, and a second name for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, stride=2, padding_mode="reflect")
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16, bias=False))
        self.again = self.mlp[0]
        self.register_buffer("shift", torch.ones(16))
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2).transpose(1, 2)
        h = self.attention(h, h, h, need_weights=False)[0] + self.shift
        return self.head(self.mlp(h).mean(1) + self.again(h.mean(1))[:, :16])


TARGETS = ["conv", "in_proj", "out_proj", "mlp.*"]


def test_layers_that_are_read_stay_dense() -> None:
    net, x = Net(), torch.randn(2, 3, 8, 8)
    cut(net, targets=TARGETS)
    before = net.eval()(x)
    assert to_plain(net) == {"conv": 3, "mlp.0": 3, "mlp.2": 3}
    assert type(net.attention) is nn.MultiheadAttention
    assert net.attention.in_proj_weight.shape == (48, 16)
    assert net.again is net.mlp[0]
    assert all(p.requires_grad for p in net.parameters())
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-5)


# --- any module -------------------------------------------------------------------------------------------------------


def test_any_module_loads_with_torch_and_safetensors(tmp_path: Path) -> None:
    net, x = Net(), torch.randn(2, 3, 8, 8)
    cut(net, targets=TARGETS)
    export = save_compressed(net, "out", inputs={"x": x})
    assert "outputs compared" in export.check
    wanted = net.eval()(x).detach()
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "README.md", "config.json", "load_compressed.py", "model.safetensors",
    ]  # fmt: skip
    save_file({"x": x, "wanted": wanted}, "samples.safetensors")
    program = "\n".join([
        "sys.modules['transformers'] = sys.modules['lightning'] = None",
        "sys.path.insert(0, 'out')",
        "import torch\nfrom torch import Tensor, nn\nfrom load_compressed import load\n"
        "from safetensors.torch import load_file",
        inspect.getsource(Net),
        "samples = load_file('samples.safetensors')",
        "net = load(Net(), 'out').eval()",
        "assert net.again is net.mlp[0]",
        "torch.testing.assert_close(net(samples['x']), samples['wanted'], rtol=0, atol=1e-5)",
    ])  # fmt: skip
    run_alone(program)


def test_another_model_is_refused_by_the_loader(tmp_path: Path) -> None:
    from lightning_peft.interop.plain_loader import load

    net = Net()
    cut(net, targets=["mlp.*"])
    save_compressed(net, "out")
    with pytest.raises(ValueError, match=r"Sequential has no layer 'mlp\.0': it is not the model that was compressed"):
        load(nn.Sequential(nn.Linear(2, 2)), "out")


def test_conv1d_and_bfloat16(tmp_path: Path, monkeypatch: Any) -> None:
    """GPT-2's layers store their weight the other way round; a narrow model is compared in float32."""
    config = hf.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, n_positions=32, vocab_size=24, bos_token_id=0, eos_token_id=0
    )
    model = hf.GPT2LMHeadModel(config).to(torch.bfloat16)
    cut(model, rank=2)
    export = save_compressed(model, "out")
    assert "outputs compared" in export.check
    tensors = load_file("out/model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.down.weight"].shape == (2, 16)
    assert tensors["transformer.h.0.attn.c_attn.up.weight"].shape == (48, 2)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


# --- refusals, and nothing half done ----------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to_plain found no adapter inside Net; inject puts them in"):
        to_plain(Net())
    with pytest.raises(
        ValueError, match=r"Net has no factorised layer that is smaller than a dense one.*smaller ratio"
    ):
        save_compressed(Net(), "out")
    whole = Net()
    inject(whole, Factorized, ["mlp.*"], [])
    with pytest.raises(ValueError, match=r"no factorised layer that is smaller"):
        save_compressed(whole, "out")
    net = Net()
    cut(net, targets=["mlp.*"])
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"full holds files that are no earlier export \(notes\.txt\)"):
        save_compressed(net, "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    save_compressed(net, "full", overwrite=True)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    pair = nn.ModuleDict({name: hf.BertModel(hf.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32)) for name in ("a", "b")})  # fmt: skip
    cut(pair)
    with pytest.raises(ValueError, match=r"ModuleDict has more than one of them. Save each part by itself: module\.a"):
        save_compressed(pair, "out")


def test_a_wrong_file_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    cut(net, targets=["mlp.*"])
    save = plain_module.save_file
    monkeypatch.setattr(
        plain_module, "save_file", lambda tensors, path: save({n: t + 1 for n, t in tensors.items()}, path)
    )
    with pytest.raises(
        RuntimeError, match=r"the compressed model was checked and is not right: .* Nothing was written"
    ):
        save_compressed(net, "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_loader_is_not_accepted(written: SimpleNamespace, tmp_path: Path, monkeypatch: Any) -> None:
    """The process that loads the folder uses what is in it, and its failure is told."""
    source = plain_module.loader_source
    monkeypatch.setattr(
        plain_module, "loader_source", lambda classes: source(classes).replace("def put_in", "def put_nothing_in")
    )
    with pytest.raises(RuntimeError, match=r"could not load and run it\. NameError: name 'put_in' is not defined"):
        save_compressed(written.decoder, "out")
    assert list(tmp_path.iterdir()) == []
