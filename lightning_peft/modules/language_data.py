"""Texts, prompts with answers, and conversations as rows of tokens, for a model that predicts the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.modules.chat import conversation, question, require_template
from lightning_peft.modules.documents import (
    Document,
    Documents,
    answers,
    as_messages,
    end_of,
    fitted,
    prompts,
    start_of,
    tokens_of,
    whole_texts,
)
from lightning_peft.modules.language_rows import Blocks, LanguageBatch, PadLeft, PadRight, Prompts, stack, stack_packed
from lightning_peft.modules.packing import Packed
from lightning_peft.modules.pair_files import read_conversations, read_pairs
from lightning_peft.modules.planned_data import NEEDED, PlannedData
from lightning_peft.modules.pretrained import padding_of
from lightning_peft.modules.text_files import read_dataset, read_texts

__all__ = ["LanguageBatch", "LanguageData", "Packing"]

Packing = Literal["blocks", "documents", "none"]
"""How documents share rows: cut from one stream, whole and kept apart, or not at all."""


class LanguageData(PlannedData):
    """Rows of tokens for a causal language model, from txt, csv, tsv, jsonl and Orange `.tab` files, or a data set.

    What a row of the file is:

    * a text, of which every token is learned (`text`);
    * a prompt and its answer, of which the answer is (`prompt`, `answer`): as they are, with `separator` between them,
      or with ``template="chat"`` as a user's and an assistant's turn in the tokenizer's own chat template;
    * a conversation, of which each turn of the assistant is (`messages`), in the same template.

    How they share rows of tokens:

    * ``"blocks"``: one stream, each text closed by the tokenizer's end-of-text token, cut into blocks; nothing is
      padded, and a text is read behind the end of the one before it. For texts only;
    * ``"documents"``: several whole documents in a row, with positions and attention of their own, so that losses and
      gradients are those of documents alone; what is left of a row, a little, is padded;
    * ``"none"``: a row for each, padded to the longest of its batch, in batches of like length.

    A text that is longer than `block_size` becomes several documents; a prompt with its answer, or a conversation,
    loses its end, and is left out where that is all of its answers: a warning says how many. Rows with an empty answer
    are left out. Labels in the files are not looked at. The order of batches depends on the seed and the epoch alone,
    and a run that is stopped inside an epoch and resumed sees exactly the batches that remain, in their order.

    For prediction rows are what is asked: texts to go on with, prompts, or conversations up to the assistant's last
    turn; they are padded on the left, and of longer ones the last `block_size` tokens are read.

    Args:
        train: training file; with `dataset`, the name of a split.
        tokenizer: hub name or folder; the same as the model's backbone.
        val: file or split to validate on; without it, `val_share` of the training rows are held out.
        test: file or split to test on.
        predict: file or split of what the model is to go on with.
        dataset: a `datasets` name, of which train, val and test are splits (needs the package `datasets`).
        text: column of the text; by default "text", or the first string column of a `.tab` file.
        prompt: column of the prompt, where there are prompts and answers.
        answer: column of the answer.
        messages: field of a `.jsonl` file with conversations, each a list of turns with "role" and "content".
        template: "plain", or "chat" for prompts and answers in the tokenizer's chat template.
        separator: text between a plain prompt and its answer; a part of the prompt.
        packing: see above; by default "blocks" for texts and "none" for all else.
        block_size: tokens per row; with packing "none", at most.
        batch_size: rows per batch and process.
        val_share: share of the training rows held out when `val` is not given (of the blocks, with packing "blocks");
            0 holds out none.
        window: batches sorted by length together, see `LengthGrouped`.
        seed: decides the order of batches and the held-out rows.
        num_workers: processes that make batches; 0 is fast enough, the texts are tokenised already.
    Raises:
        ValueError: a file, column or tokenizer that cannot be found; columns of two kinds; a tokenizer without a chat
            template, where one is needed; a text shorter than one block, or a file without an answer.
    """

    def __init__(
        self,
        train: str,
        tokenizer: str,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        dataset: str | None = None,
        text: str | None = None,
        prompt: str | None = None,
        answer: str | None = None,
        messages: str | None = None,
        template: Literal["plain", "chat"] = "plain",
        separator: str = "\n",
        packing: Packing | None = None,
        block_size: int = 256,
        batch_size: int = 8,
        val_share: float = 0.1,
        window: int = 20,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        sources = {"train": train, "val": val, "test": test, "predict": predict}
        super().__init__(sources, tokenizer, batch_size, val_share, window, seed, num_workers)
        if block_size < 2:
            raise ValueError(f"block_size={block_size}: a block needs at least 2 tokens, one to predict the next from.")
        kinds = [name for name, given in (("text", text), ("prompt", prompt), ("messages", messages)) if given]
        if len(kinds) > 1:
            raise ValueError(f"{kinds[0]}=... and {kinds[1]}=... name rows of two kinds; give one of them.")
        if (prompt is None) != (answer is None):
            raise ValueError(f"prompt={prompt!r}, answer={answer!r}: give the columns of both, or of neither.")
        self.kind = kinds[0] if kinds else "text"
        if template not in ("plain", "chat") or (template == "chat" and self.kind == "text"):
            raise ValueError(
                f"template={template!r}: choose 'plain', or 'chat' for prompt=... with answer=...; conversations "
                "(messages=...) are always in the tokenizer's chat template, texts never."
            )
        packing = packing or ("blocks" if self.kind == "text" else "none")
        if packing not in get_args(Packing) or (packing == "blocks" and self.kind != "text"):
            raise ValueError(
                f"packing={packing!r}: choose 'documents' or 'none', or for texts 'blocks', which would cut answers "
                "from their prompts."
            )
        self.save_hyperparameters()
        self.dataset, self.text, self.prompt, self.answer, self.messages = dataset, text, prompt, answer, messages
        self.chat, self.separator = template == "chat" or self.kind == "messages", separator
        self.packing, self.block_size = packing, block_size

    def read(self, stage: str) -> None:
        """Read and tokenise what the stage needs, once."""
        if self.chat:
            require_template(self.load_tokenizer(), self.tokenizer)
        for split in NEEDED[stage]:
            source = self.sources[split]
            if split in self._splits:
                continue
            if split == "train" or (split == "val" and self._holds_out):
                self._read_train()
            elif source is not None and split == "predict":
                self._splits[split] = Prompts(list(self._questions(source)), self.block_size)
            elif source is not None:
                self._splits[split] = self._rows(source)

    def lengths(self, rows: Any) -> Tensor:
        """Tokens per row."""
        return rows.lengths if isinstance(rows, Documents) else torch.full((len(rows),), self.block_size)

    def collate(self) -> Callable[[list[Any]], LanguageBatch]:
        """Stacks rows of one length, or pads them to the longest."""
        if self.packing == "none":
            return PadRight(padding_of(self.load_tokenizer()))
        return stack if self.packing == "blocks" else stack_packed

    def predict_dataloader(self) -> DataLoader[Any]:
        """What the model is to go on with, padded on the left, in the order of the file."""
        return self.in_order(self._split("predict"), PadLeft(padding_of(self.load_tokenizer())))

    def _read_train(self) -> None:
        source = self.sources["train"]
        assert source is not None
        if self.packing == "blocks":
            whole = Blocks(self._stream(source), self.block_size)
            kind = f"blocks of {self.block_size} tokens"
            for split, chosen in self._divided(range(len(whole)), source, kind).items():
                self._splits[split] = Blocks(whole.ids.flatten(), self.block_size, torch.tensor(chosen))
            return
        for split, documents in self._divided(self._documents(source), source, "documents").items():
            self._splits[split] = self._packed(documents, source)

    def _rows(self, source: str) -> Any:
        if self.packing == "blocks":
            return Blocks(self._stream(source), self.block_size)
        return self._packed(self._documents(source), source)

    def _packed(self, documents: Sequence[Document], source: str) -> Documents | Packed:
        kept, cut, lost = fitted(documents, self.block_size, split=self.kind == "text")
        if cut or lost:
            rank_zero_warn(
                f"{cut} of {len(documents)} rows of {source!r} are longer than block_size={self.block_size} and lose "
                f"their ends; {lost} of all rows are left out, because they have no answer, or nothing of it remains."
            )
        if not kept:
            raise ValueError(
                f"{source!r} has no row with anything to predict in its first {self.block_size} tokens. Give longer "
                "texts, rows with answers, or a larger block_size."
            )
        rows = Documents(kept)
        if self.packing == "none":
            return rows
        return Packed(rows, self.block_size, padding_of(self.load_tokenizer()))

    def _documents(self, source: str) -> list[Document]:
        tokenizer = self.load_tokenizer()
        if self.kind == "text":
            return list(whole_texts(tokenizer, self._texts(source)))
        if self.kind == "messages":
            assert self.messages is not None
            return [conversation(tokenizer, row) for row in read_conversations(source, self.messages, self.dataset)]
        pairs = [pair for pair in self._pairs(source) if pair.target]
        if self.chat:
            return [conversation(tokenizer, as_messages(pair)) for pair in pairs]
        return list(answers(tokenizer, pairs, self.separator))

    def _questions(self, source: str) -> list[list[int]]:
        """The tokens of what the model is to go on with."""
        tokenizer = self.load_tokenizer()
        if self.kind == "text":
            return [[*start_of(tokenizer), *row] for row in tokens_of(tokenizer, self._texts(source))]
        if self.kind == "messages":
            assert self.messages is not None
            return [question(tokenizer, row) for row in read_conversations(source, self.messages, self.dataset)]
        if self.chat:
            return [question(tokenizer, as_messages(pair)) for pair in self._pairs(source)]
        return list(prompts(tokenizer, [pair.source for pair in self._pairs(source)], self.separator))

    def _pairs(self, source: str) -> Any:
        assert self.prompt is not None
        assert self.answer is not None
        return read_pairs(source, self.prompt, self.answer, ("prompt", "answer"), self.dataset)

    def _texts(self, source: str) -> Sequence[str]:
        if self.dataset is not None:
            return [row.text for row in read_dataset(self.dataset, source, self.text)]
        return read_texts(source, self.text)

    def _stream(self, source: str) -> Tensor:
        """All texts of a file as one row of tokens."""
        tokenizer = self.load_tokenizer()
        end = end_of(tokenizer)
        pieces = [
            torch.tensor([*row, *end], dtype=torch.int32) for row in tokens_of(tokenizer, self._texts(source)) if row
        ]
        tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
        if len(tokens) < self.block_size:
            raise ValueError(
                f"{source!r} has {len(tokens)} tokens, less than one block of {self.block_size}. Give more text, or a "
                "smaller block_size."
            )
        return tokens
