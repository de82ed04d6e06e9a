"""A PEFT model that is adopted stays a PEFT model, and everything of ours drives it."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft_models import CONFIGS, Job, base, build, fit, ids, lora
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_peft import (
    DEM,
    AdapterCheckpoint,
    AdapterFileError,
    AdapterInjection,
    Adoption,
    Budget,
    Cubic,
    LoRA,
    NormShare,
    Orthogonality,
    RankBudget,
    RankMonitor,
    RankPolicy,
    RankPruning,
    Taylor,
    adopt,
    compact,
    eject,
    inject,
    load,
    merge,
    rank_heat_map,
    release,
    save_merged,
    to_hf_peft,
)
from lightning_peft.checkpoint import ENTRY, digest
from lightning_peft.interop.adoption import folded

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
    # PEFT says so of every AdaLoRA folder, its own too: the keys are names of tensors there
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match.*lora_E"),
]

each_kind = pytest.mark.parametrize("kind", CONFIGS)


def half_open(model: nn.Module) -> None:
    """Close two components of every layer."""
    budget = RankBudget.of(model)
    budget.keep({name: torch.tensor([0, 1, 0] + [1] * (len(site.gate) - 3)) for name, site in budget.items()})


@torch.no_grad()
def out(model: Any) -> Tensor:
    training = model.training
    y: Tensor = model.eval()(ids())
    model.train(training)
    return y


@each_kind
def test_adopting_changes_nothing_that_peft_sees(kind: str) -> None:
    model = build(kind, moved=True)
    before = out(model)
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    saved, state = set(get_peft_model_state_dict(model, save_embedding_layers=False)), set(model.state_dict())
    report = adopt(model)
    assert torch.equal(out(model), before)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == parameters
    assert set(get_peft_model_state_dict(model, save_embedding_layers=False)) == saved
    assert {key for key in set(model.state_dict()) ^ state if not key.endswith(".gate.mask")} == set()
    layers = [name.rpartition(".")[2] for name in report.adapted]
    assert sorted(layers) == sorted(["words", "query"] if "embedding" in kind else ["query", "value"])
    assert "base_model.model.classifier.modules_to_save.default.weight" in report.trained


@each_kind
def test_closed_component_changes_nothing_and_still_scores(kind: str) -> None:
    model = build(kind, moved=True)
    adopt(model)
    half_open(model)
    before = out(model)
    for site in RankBudget.of(model).values():
        with torch.no_grad():
            site.adapter.A[0].add_(1.0)
            site.adapter.B[:, 2].add_(1.0)
        site.gate.mask.requires_grad_(True)
    assert torch.equal(out(model), before)
    model(ids()).square().sum().backward()
    for site in RankBudget.of(model).values():
        assert site.gate.mask.grad is not None
        assert (site.gate.mask.grad[[0, 2]] != 0).all()
        if "adalora" not in kind:  # the first-order worth, where the component is open
            worth = (site.adapter.B * site.adapter.gated_parameter().grad).sum(0)  # type: ignore[operator,attr-defined]
            torch.testing.assert_close(site.gate.mask.grad[1], worth[1])


@pytest.mark.parametrize("kind", ["lora", "rslora", "embedding", "adalora"])
def test_mask_gradient_is_the_finite_difference(kind: str) -> None:
    """Not of DoRA, whose norm PEFT holds constant in the backward."""
    model = build(kind, moved=True).double().eval()
    adopt(model)
    site = next(iter(RankBudget.of(model).values()))
    site.gate.mask.requires_grad_(True)
    model(ids()).square().sum().backward()
    wanted = []
    for i in range(len(site.gate)):
        values = []
        for step in (-1, 1):
            with torch.no_grad():
                site.gate.mask[i] += step * 2**-10
                values.append(model(ids()).square().sum().item())
                site.gate.mask[i] -= step * 2**-10
        wanted.append((values[1] - values[0]) * 2**9)
    assert site.gate.mask.grad is not None
    torch.testing.assert_close(site.gate.mask.grad, torch.tensor(wanted), rtol=1e-4, atol=1e-5)


@each_kind
def test_closed_components_do_not_come_back(kind: str, tmp_path: Path) -> None:
    """Saved, merged, unloaded, copied, pickled, switched off and on: the outputs are the gated model's."""
    model = build(kind, moved=True)
    full = out(model)
    adopt(model)
    half_open(model)
    wanted = out(model)
    assert not torch.allclose(wanted, full, atol=1e-3)

    model.save_pretrained(tmp_path)
    assert (out(PeftModel.from_pretrained(base(), str(tmp_path))) - wanted).abs().max() <= 1e-6
    by_hand = get_peft_model_state_dict(model, folded(model, model.state_dict()), save_embedding_layers=False)
    other = build(kind)
    peft.set_peft_model_state_dict(other, by_hand)
    assert (out(other) - wanted).abs().max() <= 1e-6
    assert torch.equal(out(copy.deepcopy(model)), wanted)
    assert torch.equal(out(pickle.loads(pickle.dumps(model))), wanted)
    with model.disable_adapter():
        assert not torch.equal(out(model), wanted)
    assert torch.equal(out(model), wanted)
    model.merge_adapter()
    assert (out(model) - wanted).abs().max() <= 1e-6
    model.unmerge_adapter()
    assert (out(model) - wanted).abs().max() <= 1e-6
    copied = copy.deepcopy(model)
    for merged in (model.merge_and_unload(), copied.merge_and_unload(safe_merge=True)):
        assert (out(merged) - wanted).abs().max() <= 1e-6
        assert not any("lora" in name or "gate" in name for name in merged.state_dict())


@each_kind
def test_release_leaves_a_stock_model(kind: str) -> None:
    model = build(kind, moved=True)
    kinds, state, attributes = [type(m) for m in model.modules()], list(model.state_dict()), set(vars(model))
    adopt(model)
    half_open(model)
    wanted = out(model)
    release(model)
    assert torch.equal(out(model), wanted)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == state
    assert set(vars(model)) == attributes
    assert len(RankBudget.of(model)) == 0
    adopt(model)  # and again
    assert torch.equal(out(model), wanted)


@each_kind
def test_effective_weight_is_the_merged_one(kind: str) -> None:
    model = build(kind, moved=True)
    adopt(model)
    half_open(model)
    weights = {name: site.adapter.effective_weight() for name, site in RankBudget.of(model).items()}
    merged = model.merge_and_unload()
    for name, weight in weights.items():
        layer = merged.get_submodule(name.removeprefix("base_model.model."))
        wanted = layer.weight.t() if isinstance(layer, nn.Embedding) else layer.weight
        torch.testing.assert_close(weight, wanted)


def callbacks(importance: Any = None, soft: bool = False, **adoption: Any) -> list[Any]:
    policy = RankPolicy(Cubic(0.1, 0.3), importance or Taylor(), Budget(rank=2), interval=3, soft=soft)
    return [Adoption(verbose=False, **adoption), RankPruning(policy), RankMonitor(), AdapterCheckpoint()]


@each_kind
def test_prune_resume_load_and_export(kind: str, tmp_path: Path) -> None:
    """A run that stops amid an epoch ends bit for bit as one that does not; its folder gives its outputs."""
    whole = Job(kind)
    saving = partial(ModelCheckpoint, every_n_train_steps=11, save_top_k=-1, filename="{step}")
    fit(whole, *callbacks(), saving(tmp_path), enable_checkpointing=True)
    budget = RankBudget.of(whole)
    ranks = budget.ranks()
    assert sum(ranks.values()) == 4
    assert sum(len(site.gate) for site in budget.values()) >= 8
    path = tmp_path / "step=11.ckpt"
    resumed = Job(kind)
    fit(resumed, *callbacks(), saving(tmp_path), ckpt_path=path, enable_checkpointing=True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name

    last = tmp_path / "step=22.ckpt"
    assert last.stat().st_size < 120_000
    fresh, bare = Job(kind), build(kind)
    load(fresh, last)
    load(bare, last)
    assert torch.equal(out(fresh.model), out(bare))
    assert RankBudget.of(fresh).ranks() == RankBudget.of(whole).ranks()

    wanted = out(whole.model)
    for mode in ("padded", "compact", "folded"):
        done = to_hf_peft(whole, tmp_path / mode, mode, inputs=ids())
        assert done.max_difference <= 1e-6
        assert done.head == ("classifier",)
        theirs = PeftModel.from_pretrained(base(), str(tmp_path / mode))
        assert (out(theirs) - wanted).abs().max() <= 1e-6
        if mode == "compact":
            sizes = {
                name.rpartition(".")[2]: layer.r["default"]
                for name, layer in theirs.get_base_model().named_modules()
                if hasattr(layer, "lora_A")
            }
            least = 1 if "dora" in kind else 0
            given = {name.rpartition(".")[2]: max(rank, least) for name, rank in ranks.items()}
            assert sizes == {name: rank for name, rank in given.items() if rank or kind == "adalora"}
    assert to_hf_peft(whole, tmp_path / "files", "compact", check="files").max_difference == 0.0
    assert torch.equal(out(whole.model), wanted)


def test_layers_that_are_closed_are_left_out_and_dora_keeps_its_magnitude(tmp_path: Path) -> None:
    for kind in ("lora", "dora", "adalora"):
        model = build(kind, moved=True)
        adopt(model)
        budget = RankBudget.of(model)
        budget.keep({name: torch.full((4,), int("query" in name)) for name in budget})
        wanted = out(model)
        for mode in ("padded", "compact", "folded"):
            done = to_hf_peft(model, tmp_path / f"{kind}-{mode}", mode, inputs=ids())  # type: ignore[arg-type]
            assert done.max_difference <= 1e-6
            assert (out(PeftModel.from_pretrained(base(), str(done.folder))) - wanted).abs().max() <= 1e-6
        budget.keep({name: torch.zeros(4) for name in budget})
    with pytest.raises(ValueError, match="adopted layers are of rank 0"):
        to_hf_peft(model, tmp_path / "none", "folded")


def test_without_the_head(tmp_path: Path) -> None:
    model = build("lora", moved=True)
    adopt(model)
    assert to_hf_peft(model, tmp_path / "y", head=False, inputs=ids()).head == ()
    from safetensors.torch import load_file

    assert not any("classifier" in name for name in load_file(tmp_path / "y" / "adapter_model.safetensors"))


@pytest.mark.parametrize("shape", ["1d", "2d", "3d"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions(shape: str, use_dora: bool, tmp_path: Path) -> None:
    kind = {"1d": nn.Conv1d, "2d": nn.Conv2d, "3d": nn.Conv3d}[shape]

    def plain() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return nn.Sequential(kind(3, 6, 3, padding=1), nn.Tanh(), kind(6, 4, 3))  # PEFT cannot merge a 1x1x1 one

    model = get_peft_model(plain(), LoraConfig(r=3, target_modules=["0", "2"], use_dora=use_dora))
    x = torch.randn(2, 3, *[5] * int(shape[0]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    full = model(x)
    adopt(model)
    budget = RankBudget.of(model)
    budget.keep({name: torch.tensor([1, 0, 1]) for name in budget})
    wanted = model(x)
    assert not torch.allclose(wanted, full, atol=1e-3)
    done = to_hf_peft(model, tmp_path / "folder", "compact", inputs=x)
    assert done.max_difference <= 1e-6
    assert [tuple(site.adapter.B.shape) for site in budget.values()] == [(6, 3), (4, 3)]
    Orthogonality()(model, None, None).backward()
    assert (model.merge_and_unload()(x) - wanted).abs().max() <= 2e-6


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_soft_policy_zeroes_once(kind: str) -> None:
    model = build(kind, moved=True)
    adopt(model)
    site = next(iter(RankBudget.of(model).values()))
    site.gate.keep(torch.tensor([1, 0, 1, 1]), soft=True)
    factor = site.adapter.gated_parameter()  # type: ignore[operator]
    gone = factor[1] if kind == "adalora" else factor[:, 1]
    assert (gone == 0).all()
    assert factor.count_nonzero() == 3 * gone.numel()
    assert (site.gate.mask == 1).all()
    model(ids()).square().sum().backward()
    grad = factor.grad[1] if kind == "adalora" else factor.grad[:, 1]
    assert (grad != 0).any()  # so it may return


@each_kind
def test_policies_and_terms_of_ours_find_it(kind: str) -> None:
    job = Job(kind)
    fit(job, *callbacks(NormShare(), soft=True))
    assert sum(RankBudget.of(job).ranks().values()) == 4
    for term in (Orthogonality(), DEM()):
        value = term(job, None, None)
        value.backward()
        assert value > 0
    assert "AdoptedAdaLoRA" in RankBudget.of(job).table() or "AdoptedLoRA" in RankBudget.of(job).table()
    rank_heat_map(RankBudget.of(job).ranks(), 6)


def test_only_the_named_adapter_is_gated() -> None:
    model = build("lora", moved=True)
    model.add_adapter("other", lora(r=3, modules_to_save=None))
    model.set_adapter("other")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "other" in name:
                parameter.normal_(std=0.1)
    other = out(model)
    model.set_adapter("default")
    adopt(model)
    half_open(model)
    wanted = out(model)
    model.set_adapter("other")
    assert torch.equal(out(model), other)
    model.set_adapter("default")
    assert torch.equal(out(model), wanted)
    assert {len(site.gate) for site in RankBudget.of(model).values()} == {4}
    release(model)
    assert adopt(model, "other").capacity == 6


def test_adapters_can_be_loaded_beside_it(tmp_path: Path) -> None:
    build("lora", moved=True).save_pretrained(tmp_path)
    model = build("lora")
    adopt(model)
    half_open(model)
    model.load_adapter(str(tmp_path), "loaded")
    model.set_adapter("loaded")
    assert torch.equal(out(model), out(build("lora", moved=True)))


def test_layers_injected_without_a_peft_model() -> None:
    module = peft.inject_adapter_in_model(lora(modules_to_save=None), base())
    adopt(module)
    half_open(module)
    assert RankBudget.of(module).ranks() == {"query": 2, "value": 2}
    release(module)


def test_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    job = Job("lora")
    trainer = fit(job, *callbacks(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    other = get_peft_model(base(), lora(r=3))
    with pytest.raises(
        AdapterFileError, match="other adapters than this model has: at 'base_model.model.query' it has"
    ):
        load(other, tmp_path / "some.ckpt")
    assert len(RankBudget.of(other)) == 0  # nothing is left of the attempt
    with pytest.raises(
        AdapterFileError, match=r"has no PEFT layers. Build it first.*get_peft_model\(base, LoraConfig\(.*r=4"
    ):
        load(base(), tmp_path / "some.ckpt")
    with pytest.raises(AdapterFileError, match="adapter_name='default': there is 'mine'"):
        load(get_peft_model(base(), lora(), "mine"), tmp_path / "some.ckpt")


def test_crafted_recipes_are_refused(tmp_path: Path) -> None:
    job = Job("lora")
    fit(job, *callbacks(), max_epochs=1).save_checkpoint(tmp_path / "some.ckpt")
    checkpoint = torch.load(tmp_path / "some.ckpt", weights_only=True)
    entry = checkpoint[ENTRY]
    (group,) = entry["recipe"]["adapters"]
    inside = [f"{name}.base_layer" for name in group["layers"]]
    ours = {"class": "lightning_peft.adapters.lora:LoRA", "arguments": {"rank": 4}, "layers": ["model.query"]}
    for groups, sentence in (
        ([{**group, "arguments": {}}], "holds the PEFT adapter 'None'"),
        ([group, ours], "has an adapter for 'model.base_model.model.query', a layer that this model does not have"),
        ([{**ours, "layers": []}, {**group, "layers": inside}], "mixes AdoptedLoRA with adapters of other kinds"),
    ):
        entry["recipe"]["adapters"] = groups
        entry["digest"] = digest(checkpoint["state_dict"], entry)
        torch.save(checkpoint, tmp_path / "crafted.ckpt")
        fresh = Job("lora")
        with pytest.raises(AdapterFileError, match=sentence):
            load(fresh, tmp_path / "crafted.ckpt")
        assert len(RankBudget.of(fresh)) == 0


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_masks_change_without_compiling_again(kind: str) -> None:
    model = build(kind, moved=True).eval()
    adopt(model)
    compiled = torch.compile(model, backend="eager")
    counters.clear()
    with torch.no_grad():
        assert torch.equal(compiled(ids()), out(model))
        graphs = counters["stats"]["unique_graphs"]
        assert graphs > 0
        half_open(model)
        assert torch.equal(compiled(ids()), out(model))
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_release_at_the_end() -> None:
    job = Job("lora")
    fit(job, *callbacks(release=True))
    assert len(RankBudget.of(job)) == 0
    zero = [bool((p[:, i] == 0).all()) for n, p in job.named_parameters() if "lora_B" in n for i in range(4)]
    assert sum(zero) == 4


def test_adopted_before_the_trainer_and_built_late() -> None:
    job = Job("lora")
    adopt(job.model)
    fit(job, *callbacks())
    assert sum(RankBudget.of(job).ranks().values()) == 4

    class Late(Job):
        def __init__(self) -> None:
            super().__init__(model=nn.Identity())

        def configure_model(self) -> None:
            if isinstance(self.model, nn.Identity):
                self.model = build("lora")

    late = Late()
    fit(late, *callbacks())
    for name, tensor in job.state_dict().items():
        assert torch.equal(late.state_dict()[name], tensor)


def test_what_cannot_be_adopted() -> None:
    with pytest.raises(ValueError, match="adopt found no PEFT layer in Text"):
        adopt(base())
    with pytest.raises(TypeError, match="adopt takes a PeftModel"):
        adopt("model")  # type: ignore[arg-type]
    ia3 = get_peft_model(base(), peft.IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(TypeError, match="PEFT model of type IA3, which has no rank"):
        adopt(ia3)
    with pytest.raises(TypeError, match="of type OFT"):
        adopt(get_peft_model(base(), peft.OFTConfig(target_modules=["query"], oft_block_size=0, r=2)))
    model = build("lora")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="under torch.inference_mode"):
        adopt(model)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged into the base .default."):
        adopt(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="are disabled"):
        adopt(model)
    with pytest.raises(ValueError, match="adapter_name='mine': there is 'default'"):
        adopt(model, "mine")
    adopt(model)
    with pytest.raises(ValueError, match="is adopted already"):
        adopt(model)
    with pytest.raises(ValueError, match="release found nothing adopted"):
        release(base())
    attention = get_peft_model(
        nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)}), LoraConfig(r=2, target_modules=["mha"])
    )
    with pytest.raises(TypeError, match="PEFT's MultiheadAttention has no rank-one components"):
        adopt(attention)
    grouped = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    with pytest.warns(UserWarning, match="groups > 1"):
        grouped = get_peft_model(grouped, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(TypeError, match="convolution of 2 groups"):
        adopt(grouped)


def test_surgery_of_ours_leaves_it_alone(tmp_path: Path) -> None:
    model = build("lora")
    adopt(model)
    for verb in (merge, compact, eject, lambda m: inject(m, LoRA), lambda m: save_merged(m, tmp_path)):
        with pytest.raises(ValueError, match="is PEFT's own, adopted"):
            verb(model)  # type: ignore[operator]
    model.delete_adapter("default")
    with pytest.raises(RuntimeError, match="the adapter 'default' of this Linear is gone"):
        RankBudget.of(model)["base_model.model.query"].adapter.A.shape  # noqa: B018
    release(model)
    assert len(RankBudget.of(model)) == 0
    injected = base()
    inject(injected, LoRA)
    with pytest.raises(ValueError, match="has adapters that inject put in"):
        adopt(injected)


def test_what_was_trained_beside_it_is_written_or_refused(tmp_path: Path) -> None:
    """Compared on a base that was never trained: the check's own copy of the base has it all."""

    def vision() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))

    x = torch.randn(3, 3, 6, 6)
    for use_dora in (False, True):
        model = get_peft_model(vision(), LoraConfig(r=2, target_modules=["0"], use_dora=use_dora))
        model.get_base_model()[2].requires_grad_(True)
        with torch.no_grad():
            model.get_base_model()[2].weight.add_(1.0)
        adopt(model)
        model.train()(5 * x)  # which moves the running statistics
        if use_dora:
            model.requires_grad_(False)  # frozen when it is trained
        wanted = model.eval()(x)
        done = to_hf_peft(model, tmp_path / str(use_dora), inputs=x)
        assert done.head == ("2", "1")
        theirs = PeftModel.from_pretrained(vision(), str(done.folder)).eval()
        assert (theirs(x) - wanted).abs().max() <= 1e-5
    assert to_hf_peft(model, tmp_path / "none", head=False, inputs=x).head == ()

    module = nn.Module()
    module.model, module.decision = build("lora", moved=True), nn.Linear(3, 1)
    adopt(module)
    with pytest.raises(
        ValueError, match=r"outside the PeftModel: 'decision\.weight', 'decision\.bias'\. A PEFT folder"
    ):
        to_hf_peft(module, tmp_path / "x")
    assert to_hf_peft(module.model, tmp_path / "inside", inputs=ids()).head == ("classifier",)
    del module.decision
    module.model.get_base_model().words.requires_grad_(True)
    module.model.get_base_model().value.base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"not a whole module: 'value\.base_layer\.bias'\. PEFT keeps whole modules"):
        to_hf_peft(module, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "bias",
    [
        "all",
        pytest.param(
            "lora_only",
            marks=pytest.mark.skipif(
                Version(peft.__version__) < Version("0.21"), reason="PEFT before 0.21 leaves them out of its own files"
            ),
        ),
    ],
)
def test_biases_that_peft_trains_are_written(bias: str, tmp_path: Path) -> None:
    model = get_peft_model(base(), lora(bias=bias, modules_to_save=None))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    adopt(model)
    half_open(model)
    for mode in ("padded", "compact", "folded"):
        done = to_hf_peft(model, tmp_path / mode, mode, inputs=ids())  # type: ignore[arg-type]
        theirs = PeftModel.from_pretrained(base(), str(done.folder))
        assert (out(theirs) - out(model)).abs().max() <= 1e-6


def test_exported_while_another_adapter_is_active(tmp_path: Path) -> None:
    model = build("lora", moved=True)
    adopt(model)
    half_open(model)
    wanted = out(model)
    model.add_adapter("other", lora(r=3, init_lora_weights=False, modules_to_save=None))
    model.set_adapter("other")
    done = to_hf_peft(model, tmp_path / "y", inputs=ids())
    assert model.active_adapters == ["other"]
    assert (out(PeftModel.from_pretrained(base(), str(done.folder))) - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["lora", "embedding", "adalora"])
def test_another_adapter_of_the_name_is_not_gated(kind: str) -> None:
    """Deleted and added again: nothing of ours may say that it has gates, or leave some behind."""
    config = CONFIGS[kind]()
    config.modules_to_save = None  # of which PEFT cannot delete the last one
    model = get_peft_model(base(), config)
    adopt(model)
    half_open(model)
    model.delete_adapter("default")
    release(model)  # of what is gone: nothing stays masked
    assert not any("Masked" in type(child).__name__ for child in model.modules())
    model = get_peft_model(base(), lora(modules_to_save=None))
    adopt(model)
    model.delete_adapter("default")
    model.add_adapter("default", lora(modules_to_save=None))
    model.set_adapter("default")
    site = RankBudget.of(model)["base_model.model.query"]
    with pytest.raises(RuntimeError, match="the adapter 'default' of this Linear is gone. Call release"):
        site.adapter.B.shape  # noqa: B018
    with pytest.raises(RuntimeError, match="the adapter 'default' of this Linear is gone. Call release"):
        list(site.adapter.own_parameters())
    half_open(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    release(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert adopt(model).capacity == 8


@pytest.mark.parametrize("kind", ["lora", "embedding", "adalora"])
def test_reset_starts_all_factors_anew(kind: str) -> None:
    model = build(kind, moved=True)
    adopt(model)
    half_open(model)
    for site in RankBudget.of(model).values():
        site.adapter.reset_parameters()
        assert (site.adapter.update() == 0).all()
        assert any((p == 0).all() for _, p in site.adapter.own_parameters())
        assert site.adapter.gated_parameter().grad_fn is None  # type: ignore[operator]
    assert any("Masked" in type(child).__name__ for child in model.modules())


def test_a_container_takes_no_gates() -> None:
    """Its entries are called, or listed: one more would break it."""
    net = peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    before = net(torch.ones(1, 4))
    with pytest.raises(ValueError, match="layer '0': the gates would be one more entry of a Sequential"):
        adopt(net)
    assert torch.equal(net(torch.ones(1, 4)), before)
    holder = nn.Module()
    holder.net = net
    assert adopt(holder).adapted == ("net.0",)
    assert torch.equal(net(torch.ones(1, 4)), before)


def test_frozen_adapters_are_told(tmp_path: Path) -> None:
    build("lora").save_pretrained(tmp_path)
    report = str(adopt(PeftModel.from_pretrained(base(), str(tmp_path))))
    assert "Its parameters are frozen, as PEFT loads them for inference: to train, load with" in report
    assert "frozen" not in str(adopt(PeftModel.from_pretrained(base(), str(tmp_path), is_trainable=True)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_adapter_that_transformers_added_is_saved_folded(wrapped: bool, tmp_path: Path) -> None:
    def bert() -> Any:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).eval()

    model = bert()
    model.add_adapter(LoraConfig(r=4, target_modules=["value", "dense"], init_lora_weights=False))
    module = nn.Module()
    module.inner = model
    adopt(module if wrapped else model)
    half_open(module)
    wanted = model(ids()).last_hidden_state
    model.save_pretrained(tmp_path)
    fresh = bert()
    fresh.load_adapter(str(tmp_path))
    assert (fresh.eval()(ids()).last_hidden_state - wanted).abs().max() <= 1e-6
    release(module)
    assert torch.equal(model(ids()).last_hidden_state, wanted)
    assert "save_pretrained" not in vars(model)


@pytest.mark.skipif(not hasattr(peft, "KasaConfig"), reason="this PEFT has no KaSA; 0.21 is the first")
def test_other_adapters_cannot_be_exported_cut(tmp_path: Path) -> None:
    model = get_peft_model(base(), lora(kasa_config=peft.KasaConfig()))
    adopt(model)
    with pytest.raises(TypeError, match="to_hf_peft does not cut PEFT's Kasa"):
        to_hf_peft(model, tmp_path / "x")


def test_adapters_that_changed_the_base_cannot_be_exported_cut(tmp_path: Path) -> None:
    model = get_peft_model(base(), lora(init_lora_weights="pissa"))
    adopt(model)
    with pytest.raises(TypeError, match="init_lora_weights='pissa' changed the base"):
        to_hf_peft(model, tmp_path / "x")


def test_set_ups_that_are_refused() -> None:
    job = Job("lora")
    with pytest.raises(MisconfigurationException, match="AdapterInjection and Adoption are both"):
        fit(job, AdapterInjection(LoRA), Adoption())
    with pytest.raises(MisconfigurationException, match="RankMonitor comes before Adoption"):
        fit(job, RankMonitor(), Adoption(verbose=False))
    pruning = RankPruning(RankPolicy(Cubic(), Taylor(), Budget(rank=2)), compact="final")
    with pytest.raises(MisconfigurationException, match="those of an adopted PEFT model are PEFT's and stay"):
        fit(job, Adoption(verbose=False), pruning)

    class HeadOnly(Job):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.base_model.model.classifier.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match="'lora_A.weight' of the adapter at .* is in no optimizer"):
        fit(HeadOnly("lora"), Adoption(verbose=False))
