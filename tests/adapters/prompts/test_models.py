"""A prompt in front of every sort of transformers model: masks, positions, labels, pooling, rows of the output."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from prompted import LENGTH, TEXTS, TOKENS, build, two_texts
from torch import Tensor, nn

from lightning_peft import Adapter, DePT, SoftPrompt, inject
from lightning_peft.adapters.prompts import Prompt
from lightning_peft.adapters.prompts.text_model import embedded

M = 4
GENERATE: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def prompted(kind: str, position: Any = "start") -> SoftPrompt:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        adapter = SoftPrompt(build(kind), M, "random", prompt_position=position).eval()
        torch.nn.init.normal_(adapter.P)
    return adapter


def decoder(model: Any) -> dict[str, Tensor]:
    """What a decoder beside an encoder is shown."""
    return {"decoder_input_ids": torch.tensor([[3, 4], [5, 6]])} if model.config.is_encoder_decoder else {}


def only(i: int, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[i : i + 1] for name, value in inputs.items()}


def found(output: Any) -> Tensor:
    names = ("logits", "start_logits", "last_hidden_state")
    tensor: Tensor = next(output[name] for name in names if name in output)
    return tensor


# The first column of an encoder's classifier is a padding on the left, and BART counts columns: the models' own limits.
@pytest.mark.parametrize(
    ("kind", "position", "sides"),
    [
        *(
            (kind, "start", "left right")
            for kind in ("bert", "bert tokens", "bert answers", "roberta", "llama", "gpt2")
        ),
        *((kind, "start", "left right") for kind in ("llama classifier", "gpt2 classifier", "t5", "t5 encoder")),
        ("bert backbone", "start", "left right"),
        ("bart", "start", "right"),
        ("bert", "after_cls", "right"),
        ("roberta", "after_cls", "right"),
        ("bert tokens", "after_cls", "left right"),
        ("bert answers", "after_cls", "left right"),
        ("llama", "after_cls", "left right"),
        ("llama classifier", "after_cls", "left right"),
        ("t5", "after_cls", "left right"),
    ],
)
def test_property_padding_changes_nothing(kind: str, position: str, sides: str) -> None:
    adapter = prompted(kind, position)
    more = decoder(adapter)
    with torch.no_grad():
        alone = [found(adapter(input_ids=t[None], **only(i, more)))[0] for i, t in enumerate(TEXTS)]
        for side in sides.split():
            inputs = two_texts(adapter, side)
            both = found(adapter(**inputs, **more))
            if both.shape[1] == LENGTH:  # a row per token
                both = [row[shown.bool()] for row, shown in zip(both, inputs["attention_mask"], strict=True)]
            for mine, expected in zip(both, alone, strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2", "t5", "bart"])
def test_it_is_the_model_called_with_longer_embeddings(kind: str) -> None:
    """What transformers itself computes of [P ; X], with everything that goes with it given by hand."""
    adapter = prompted(kind)
    inputs, model = two_texts(adapter, "right"), adapter.base
    inside = model.get_encoder() if kind in ("t5", "bart") else model
    with torch.no_grad():
        text = inside.get_input_embeddings()(inputs["input_ids"])
        both = torch.cat([adapter.prompt().expand(2, -1, -1), text], 1)
        mask = torch.cat([torch.ones(2, M, dtype=torch.long), inputs["attention_mask"]], 1)
        more = decoder(model)
        if kind in ("llama", "gpt2"):
            more["position_ids"] = torch.arange(M + LENGTH)[None]
        expected = model(inputs_embeds=both, attention_mask=mask, **more).logits
        actual = adapter(**inputs, **decoder(model)).logits
    if kind in ("llama", "gpt2"):
        expected = expected[:, M:]
        expected, actual = expected[mask[:, M:].bool()], actual[mask[:, M:].bool()]
    torch.testing.assert_close(actual, expected)


def test_pooling_after_the_first_token() -> None:
    """[<s> ; P ; rest]: a classifier that pools the first column pools the text's own first token."""
    adapter, model = prompted("roberta", "after_cls"), build("roberta")
    ids = TEXTS[0][None]
    with torch.no_grad():
        text = model.get_input_embeddings()(ids)
        both = torch.cat([text[:, :1], adapter.prompt()[None], text[:, 1:]], 1)
        expected = model(inputs_embeds=both).logits
        torch.testing.assert_close(adapter(input_ids=ids).logits, expected)
        assert not torch.allclose(prompted("roberta")(input_ids=ids).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_property_loss_ignores_the_prompts_labels(kind: str, side: str) -> None:
    adapter = prompted(kind)
    inputs = two_texts(adapter, side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    first = inputs["attention_mask"].argmax(1)
    labels[range(2), first] = -100  # without it, the losses are of the same tokens
    output = adapter(**inputs, labels=labels)
    assert output.logits.shape == (2, LENGTH, TOKENS)
    shown = labels[:, 1:] != -100
    by_hand = nn.functional.cross_entropy(output.logits[:, :-1][shown], labels[:, 1:][shown])
    torch.testing.assert_close(output.loss, by_hand)


def test_first_token_is_predicted_by_the_prompt() -> None:
    adapter = prompted("llama")
    ids = TEXTS[0][None]
    with torch.no_grad():
        both = torch.cat([adapter.prompt()[None], adapter.base.get_input_embeddings()(ids)], 1)
        rows = adapter.base(inputs_embeds=both).logits
        expected = nn.functional.cross_entropy(rows[0, M - 1 : -1], ids[0])
        torch.testing.assert_close(adapter(input_ids=ids, labels=ids).loss, expected)


@pytest.mark.parametrize("position", ["start", "after_cls"])
def test_labels_of_tokens_and_of_answers_move_with_the_text(position: str) -> None:
    tokens, answers = prompted("bert tokens", position), prompted("bert answers", position)
    inputs = two_texts(tokens, "right")
    labels = torch.randint(3, (2, LENGTH)).masked_fill(inputs["attention_mask"] == 0, -100)
    output = tokens(**inputs, token_type_ids=torch.ones(2, LENGTH, dtype=torch.long), labels=labels)
    assert output.logits.shape == (2, LENGTH, 3)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    start, end = torch.tensor([0, 1]), torch.tensor([3, 2])
    output = answers(**inputs, start_positions=start, end_positions=end)
    assert output.start_logits.shape == (2, LENGTH)
    # The loss is over the prompt's columns too: it is larger than over the text's alone, never smaller.
    over_text = (
        sum(nn.functional.cross_entropy(*each) for each in ((output.start_logits, start), (output.end_logits, end))) / 2
    )
    assert over_text < output.loss < over_text + 10


def test_hidden_states_are_the_texts() -> None:
    adapter = prompted("bert backbone")
    adapter.set_attn_implementation("eager")  # which has attentions to show
    output = adapter(**two_texts(adapter, "right"), output_hidden_states=True, output_attentions=True)
    assert output.last_hidden_state.shape == (2, LENGTH, 16)
    assert [each.shape for each in output.hidden_states] == 3 * [(2, LENGTH, 16)]
    assert output.attentions[0].shape[-2:] == (M + LENGTH, M + LENGTH)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_it_returns_a_tuple_where_the_model_would() -> None:
    adapter = prompted("llama")
    inputs = two_texts(adapter, "left")
    expected = adapter(**inputs)
    (logits, *_) = adapter(inputs["input_ids"], inputs["attention_mask"], return_dict=False)
    assert torch.equal(logits, expected.logits)


@pytest.mark.parametrize("kept", [0, 1, 3, 7, 9, torch.tensor([0, 6])])
def test_rows_that_are_kept_are_the_texts(kept: Any) -> None:
    adapter = prompted("llama")
    inputs = two_texts(adapter, "left")
    rows = adapter(**inputs).logits
    expected = rows[:, -kept:] if isinstance(kept, int) else rows[:, kept]
    torch.testing.assert_close(adapter(**inputs, logits_to_keep=kept).logits, expected)


def test_it_takes_embeddings_in_the_place_of_ids() -> None:
    adapter = prompted("llama")
    inputs = two_texts(adapter, "left")
    text = adapter.get_input_embeddings()(inputs["input_ids"])
    actual = adapter(inputs_embeds=text, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(actual, adapter(**inputs).logits)


@pytest.mark.parametrize("position", ["start", "after_cls"])
def test_it_takes_the_callers_positions(position: str) -> None:
    adapter = prompted("gpt2", position)
    inputs = two_texts(adapter, "left")
    counted = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    shown = inputs["attention_mask"].bool()
    expected = adapter(**inputs).logits[shown]
    torch.testing.assert_close(adapter(**inputs, position_ids=counted).logits[shown], expected)
    moved = adapter(**inputs, position_ids=counted + 5).logits[shown]
    assert not torch.allclose(moved, expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_property_generation(kind: str, beams: int) -> None:
    """With a cache or without, padded or not, token ids go in and out as without a prompt."""
    adapter = prompted(kind)
    more = {**GENERATE, "num_beams": beams}
    shown = [{"input_ids": text[None], "attention_mask": torch.ones_like(text[None])} for text in TEXTS]
    alone = [adapter.generate(**each, **more)[0] for each in shown]
    if kind in ("llama", "gpt2"):
        assert all(torch.equal(ids[:-6], text) for ids, text in zip(alone, TEXTS, strict=True))
    assert torch.equal(adapter.generate(**shown[0], **more, use_cache=False)[0], alone[0])
    padded = adapter.generate(**two_texts(adapter, "right" if kind == "bart" else "left"), **more)
    assert all(torch.equal(mine[-6:], ids[-6:]) for mine, ids in zip(padded, alone, strict=True))
    with torch.no_grad():
        felt = [found(model(**shown[0], **only(0, decoder(adapter)))) for model in (adapter, adapter.base)]
    assert (felt[0] - felt[1]).abs().max() > 0.01


@pytest.mark.parametrize("position", ["start", "after_cls"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_property_generation_is_greedy(kind: str, position: str) -> None:
    adapter = prompted(kind, position)
    ids = TEXTS[0][None]
    with torch.no_grad():
        for _ in range(6):
            logits = adapter(input_ids=ids).logits[:, -1]
            logits[:, adapter.config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    mask = torch.ones_like(TEXTS[0][None])
    assert torch.equal(adapter.generate(input_ids=TEXTS[0][None], attention_mask=mask, **GENERATE), ids)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_what_is_sampled_is_the_same_with_a_cache_and_without(kind: str) -> None:
    adapter = prompted(kind)
    inputs, written = two_texts(adapter, "left"), []
    for cached, seed in ((True, 3), (False, 3), (True, 4)):
        torch.manual_seed(seed)
        written.append(adapter.generate(**inputs, **GENERATE | {"do_sample": True, "use_cache": cached}))
    assert torch.equal(written[0], written[1])
    assert not torch.equal(written[0], written[2])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_prefix_is_computed_once(kind: str, beams: int) -> None:
    adapter = prompted(kind)
    inputs, more = two_texts(adapter, "left"), {**GENERATE, "num_beams": beams}
    expected = adapter.generate(**inputs, **more)
    lengths: list[int] = []
    with adapter.prefix_cached():
        hook = adapter.get_input_embeddings().register_forward_hook(lambda m, a, o: lengths.append(a[0].shape[1]))
        assert torch.equal(adapter.generate(**inputs, **more), expected)
        assert lengths[0] == LENGTH  # the prompt is not read again
        adapter(**inputs).logits.sum().backward()  # what needs a gradient reads it
        assert adapter.P.grad is not None
        assert bool(adapter.P.grad.any())
        hook.remove()
    assert adapter._prefix is None


def test_a_prefix_has_no_dropout_and_ends_where_it_began() -> None:
    adapter = prompted("llama")
    adapter.base.config.attention_dropout = 0.5
    for layer in adapter.base.model.layers:  # type: ignore[union-attr, operator]
        layer.self_attn.attention_dropout = 0.5  # type: ignore[union-attr]
    inputs = two_texts(adapter, "left")
    expected = adapter.eval().generate(**inputs, **GENERATE)
    adapter.train()
    with adapter.prefix_cached():
        assert adapter.training
        with adapter.eval().prefix_cached():
            assert torch.equal(adapter.generate(**inputs, **GENERATE), expected)
        assert torch.equal(adapter.generate(**inputs, **GENERATE), expected)
    assert adapter._prefix is None


class Shifted(Prompt):
    """Adds a vector per place, to see which place each token is told."""

    def __init__(self, base: nn.Module, align: Any = "tokens") -> None:
        super().__init__(base, M)
        self.align = align
        self.P = nn.Parameter(torch.randn(M, self.width))
        self.O = nn.Parameter(torch.randn(20, self.width))
        self.seen: list[list[list[int]]] = []

    def prompt(self) -> Tensor:
        return self.P

    def offsets(self, positions: Tensor) -> Tensor:
        self.seen.append(positions.tolist())
        return nn.functional.embedding(positions + 1, torch.cat([torch.zeros(1, self.width), self.O]))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_offsets_count_the_tokens_that_are_shown(kind: str) -> None:
    torch.manual_seed(1)
    adapter = Shifted(build(kind))
    more = decoder(adapter)
    with torch.no_grad():
        for side in ("left", "right"):
            both = adapter(**two_texts(adapter, side), **more).logits
            for i, text in enumerate(TEXTS):
                alone = adapter(input_ids=text[None], **only(i, more)).logits[0]
                at = slice(None) if kind == "t5" else slice(-len(text), None) if side == "left" else slice(len(text))
                torch.testing.assert_close(both[i, at], alone, rtol=1e-5, atol=1e-5)
    assert adapter.seen[0] == [[-1, -1, 0, 1, 2, 3, 4], [-1, -1, -1, -1, 0, 1, 2]]
    adapter.align, adapter.seen = "absolute", []
    adapter(**two_texts(adapter, "left"), **more)
    assert adapter.seen == [[[-1, -1, 2, 3, 4, 5, 6], [-1, -1, -1, -1, 4, 5, 6]]]


def test_generated_tokens_have_the_offset_of_their_place() -> None:
    torch.manual_seed(1)
    adapter = Shifted(build("llama"))
    inputs = two_texts(adapter, "left")
    cached = adapter.generate(**inputs, **GENERATE)
    assert adapter.seen[1] == [[5], [3]]
    assert torch.equal(cached, adapter.generate(**inputs, **GENERATE, use_cache=False))
    with adapter.prefix_cached():
        assert torch.equal(cached, adapter.generate(**inputs, **GENERATE))


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_start_is_of_embeddings_as_the_model_has_them(kind: str) -> None:
    """BART's are scaled: a prompt that starts as a text is that text, read twice."""
    model = build(kind)
    adapter = SoftPrompt(model, 3, "text", text_ids=[5, 6]).eval()
    embedding = model.get_encoder().get_input_embeddings()
    assert torch.equal(adapter.P, embedding(torch.tensor([5, 6, 5])))
    assert torch.equal(adapter.P, embedded(embedding, torch.tensor([5, 6, 5])))
    alone = build(kind)(input_ids=torch.tensor([[5, 6, 5, 7, 8]]), decoder_input_ids=torch.tensor([[3, 4]])).logits
    actual = adapter(input_ids=torch.tensor([[7, 8]]), decoder_input_ids=torch.tensor([[3, 4]])).logits
    torch.testing.assert_close(actual, alone)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "bart"])
def test_checkpointed_activations_give_the_same_gradients(kind: str) -> None:
    gradients = []
    # Recomputed by re-entrance, a decoder gives its encoder no gradient: it is handed over by name.
    for recompute in (None, False, True) if kind in ("bert", "llama") else (None, False):
        adapter = prompted(kind).train()
        if recompute is not None:
            older = getattr(adapter, "gradient_checkpointing_enable", None)
            getattr(adapter, "activation_checkpointing_enable", older)({"use_reentrant": recompute})
        adapter(**two_texts(adapter, "right"), **decoder(adapter)).logits.square().mean().backward()
        gradients.append(adapter.P.grad)
        assert all(p.grad is None for p in adapter.base.parameters())
    for each in gradients:
        torch.testing.assert_close(each, gradients[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_prompt_on_a_narrow_model(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    adapter = SoftPrompt(model, M)
    assert adapter.P.dtype == torch.float32
    inputs = two_texts(adapter, "left")
    assert adapter(**inputs).logits.dtype == dtype
    adapter(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert adapter.P.grad is not None
    assert adapter.P.grad.dtype == torch.float32
    assert bool(adapter.P.grad.any())


def test_property_base_is_bit_identical_after_training() -> None:
    adapter = SoftPrompt(build("t5"), M).train()
    before = copy.deepcopy(adapter.base.state_dict())
    ids = torch.randint(2, TOKENS, (8, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2, 10)[:, None]
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(30):
        loss = adapter(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in adapter.base.state_dict().items())


def test_nothing_is_left_listening() -> None:
    adapter = prompted("t5")
    adapter(**two_texts(adapter, "right"), **decoder(adapter))
    adapter.generate(**two_texts(adapter, "right"), **GENERATE)
    with pytest.raises(ValueError, match="both given"):
        adapter(**two_texts(adapter, "right"), inputs_embeds=torch.zeros(2, LENGTH, 16), **decoder(adapter))
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in adapter.modules())


def test_it_is_no_layer() -> None:
    adapter = prompted("bert")
    assert isinstance(adapter, Adapter)
    assert adapter.dense_parameters == 0
    with pytest.raises(TypeError, match="no single weight"):
        adapter.effective_weight()


COLUMNS: dict[str, Any] = {
    "vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS: dict[str, Any] = {f"linear_{of}": 2 for of in ("num_key_heads", "num_value_heads")}
HEADS |= {f"linear_{of}": 8 for of in ("key_head_dim", "value_head_dim")}
HEADS |= {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
COUNTING: dict[str, Any] = {
    "window": lambda: hf.MistralConfig(**COLUMNS, sliding_window=4),
    "windows and all": lambda: hf.Gemma2Config(**COLUMNS, head_dim=8, sliding_window=4),
    "local and global": lambda: hf.GPTNeoConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        intermediate_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "convolution": lambda: hf.Lfm2Config(**COLUMNS, layer_types=["conv", "full_attention"]),
    "recurrence": lambda: hf.Qwen3NextConfig(
        **COLUMNS, **HEADS, head_dim=8, layer_types=["linear_attention", "full_attention"]
    ),
}


def in_front_of(config: Any, kind: Any = hf.AutoModelForCausalLM, prompt: Any = SoftPrompt, **sizes: Any) -> Any:
    """A model with large weights, and a prompt of three."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = nn.ModuleDict({"model": kind.from_config(config).eval()})
        for parameter in host.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
        inject(host, partial(prompt, length=3, **sizes), train=[])
    return host["model"].eval()


@pytest.mark.parametrize("kind", COUNTING)
def test_padding_does_not_come_between_prompt_and_text_where_columns_count(kind: str) -> None:
    model = in_front_of(COUNTING[kind]())
    ids = torch.randint(3, TOKENS, (1, 6))
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1)
    more: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        behind = model(input_ids=padded, attention_mask=padded.ne(0).long()).logits[:, 2:]
        torch.testing.assert_close(behind, alone, rtol=1e-3, atol=1e-4)
        written = model.generate(input_ids=padded, attention_mask=padded.ne(0).long(), **more)[:, 2:]
        with model.prefix_cached():  # which has no place for a prompt behind padding
            again = model.generate(input_ids=padded, attention_mask=padded.ne(0).long(), **more)[:, 2:]
        assert torch.equal(again, written)
        for _ in range(4):
            ids = torch.cat(
                [ids, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:].argmax(-1)], 1
            )
    assert torch.equal(written, ids)


DISTANCES: dict[str, Any] = {
    "mpnet": lambda: hf.MPNetConfig(**COLUMNS | {"pad_token_id": 1}),
    "deberta": lambda: hf.DebertaV2Config(**COLUMNS, relative_attention=True, pos_att_type=["c2p", "p2c"]),
}


@pytest.mark.parametrize("kind", DISTANCES)
def test_padding_does_not_come_between_prompt_and_text_where_an_encoder_knows_distances(kind: str) -> None:
    config = DISTANCES[kind]()
    config.position_biased_input = False
    model = in_front_of(config, hf.AutoModelForTokenClassification)
    ids = torch.randint(3, TOKENS, (1, 6))
    padded = nn.functional.pad(ids, (2, 0), value=config.pad_token_id)
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        behind = model(input_ids=padded, attention_mask=padded.ne(config.pad_token_id).long()).logits[:, 2:]
    torch.testing.assert_close(behind, alone, rtol=1e-3, atol=1e-4)


def test_a_model_that_pads_the_text_itself_has_no_offsets_there() -> None:
    config = hf.LongformerConfig(**COLUMNS | {"pad_token_id": 1}, attention_window=4)
    model = in_front_of(config, hf.AutoModelForTokenClassification, DePT, rank=2, reach=16)
    nn.init.normal_(model.B)
    ids = torch.randint(3, TOKENS, (1, 5))
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # 8 columns, of windows of 4
        longer = torch.cat([ids, ids[:, :1]], 1)
        mask = torch.ones_like(longer)
        mask[:, -1] = 0
        again = model(input_ids=longer, attention_mask=mask).logits[:, :-1]  # 9, which the model makes 12
    torch.testing.assert_close(again, first, rtol=1e-3, atol=1e-4)


def test_a_model_that_turns_the_text_around_is_refused() -> None:
    config = hf.XLNetConfig(vocab_size=TOKENS, d_model=16, n_layer=2, n_head=2, d_inner=32, pad_token_id=0)
    model = in_front_of(config, hf.AutoModelForTokenClassification)
    with pytest.raises(RuntimeError, match=r"embeds \(6, 2\) tokens where a text of \(2, 6\), the prompt's 3 columns "):
        model(input_ids=torch.randint(3, TOKENS, (2, 3)))


@pytest.mark.parametrize("cached", [False, True])
def test_a_state_that_does_not_say_what_was_read_is_refused(cached: bool) -> None:
    config = hf.MambaConfig(vocab_size=TOKENS, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0)
    model = in_front_of(config)
    ids = torch.randint(3, TOKENS, (1, 6))
    more: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": cached}
    if cached:
        with pytest.raises(
            ValueError, match=r"MambaForCausalLM goes on from a state, .* Generate with use_cache=False"
        ):
            model.generate(input_ids=ids, **more)
        return
    written = model.generate(input_ids=ids, **more)
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids)
