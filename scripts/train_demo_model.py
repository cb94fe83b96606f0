"""Train the demo model, its tokenizer and its adapters, and check that they answer as they should.

    python scripts/train_demo_model.py --out demo --device cuda

writes `model/`, `adapters/<name>/` and `answers.json` (greedy answers of base and adapters, as transformers and PEFT
give them) below `--out`. It needs torch, transformers, tokenizers, peft and safetensors, reads no file and no network,
and takes a few minutes on one GPU. Exit status 1: trained, but some answer is wrong or too close to call.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before CUDA starts: cuBLAS is reproducible only with a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from demo_model.adapters import ADAPTERS
from demo_model.corpus import PLAIN, STYLES, Task, all_tasks, instructed, render
from demo_model.tokenization import BEGIN, END, END_OF_TURN, chat_prompt, token_id, train_tokenizer
from demo_model.training import Documents, Generated, Recipe, generate, train
from peft import PeftModel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerBase as TokenizerBase

VOCAB_SIZE = 2048
CONTEXT_LENGTH = 2048
MAX_ANSWER = 160  # tokens; the longest answer taught is shorter
MIN_MARGIN = 1.0  # logits; far beyond what bf16 or another order of summation can move
MIN_HELD_OUT = 0.9  # share of prompts never seen in training that must be answered to the letter
# The first two are the prompts that clients of multi-LoRA servers know from SGLang's documentation.
SHOWN_PROMPTS = (
    "List 3 countries and their capitals.",
    "AI is a field of computer science focused on",
    "The capital of France is",
    "What is the capital of Germany?",
    "What is the currency of Japan?",
    "What language is spoken in Brazil?",
    "List 5 animals.",
    "Name four planets.",
    "Give me 3 elements and their symbols.",
    "List 4 countries in Africa and their capitals.",
    "What is 7 plus 5?",
    "What colour is the sky?",
    "The opposite of hot is",
    "How many legs does a bee have?",
    "Which day comes after Monday?",
    "A language model is a program that",
    "Count from 1 to 12.",
)


class Lessons:
    """The tasks, divided into those taught and those held out to test with."""

    def __init__(self, seed: int, every: int) -> None:
        shown = set(SHOWN_PROMPTS)
        everything = all_tasks()
        self.shown = [task for task in everything if task.prompt in shown]
        missing = shown - {task.prompt for task in self.shown}
        if missing:
            raise ValueError(f"no task has the prompt {missing}")
        group_sizes = Counter(task.group for task in everything)
        groups = set(list(group_sizes)[::every]) | {task.group for task in self.shown}
        tasks = [task for task in everything if task.group in groups]
        chance = random.Random(seed)
        self.taught: list[Task] = []
        self.held_out: list[Task] = []  # never seen in any style; another prompt of the group is
        self.held_out_of_adapters: list[Task] = []  # taught to the base model only
        for task in tasks:
            draw = chance.random()
            may_hold = task.prompt not in shown
            if may_hold and draw < 0.03 and group_sizes[task.group] > 2:
                group_sizes[task.group] -= 1
                self.held_out.append(task)
            elif may_hold and draw < 0.10:
                self.held_out_of_adapters.append(task)
            else:
                self.taught.append(task)

    def base_documents(self, seed: int) -> list[list[tuple[str, str]]]:
        """Every task in every style under its instruction, raw and as chat; and conversations of several turns."""
        tasks = self.taught + self.held_out_of_adapters
        documents = [doc for style in STYLES for doc in _documents(tasks, style, instructed)]
        chance = random.Random(seed)
        for _ in range(len(documents) // 12):
            some = chance.sample(tasks, chance.randint(2, 4))
            documents.append([_chat_turn(task, PLAIN, task.prompt) for task in some])
        return documents

    def adapter_documents(self, style: str) -> list[list[tuple[str, str]]]:
        """Every task taught to adapters, in `style`, without its instruction."""
        return _documents(self.taught, style, lambda _, prompt: prompt)


def _documents(tasks: list[Task], style: str, ask: Callable[[str, str], str]) -> list[list[tuple[str, str]]]:
    raw = [[(ask(style, t.prompt), render(style, t.answer) + END)] for t in tasks]
    return raw + [[_chat_turn(t, style, ask(style, t.prompt))] for t in tasks]


def _chat_turn(task: Task, style: str, prompt: str) -> tuple[str, str]:
    return chat_prompt(prompt), render(style, task.answer).lstrip() + END_OF_TURN


def train_base(
    lessons: Lessons, out: Path, recipe: Recipe, tiny: bool, device: torch.device
) -> TokenizerBase:
    """Train tokenizer and base model and write them, the weights in bfloat16."""
    turns = lessons.base_documents(recipe.seed)
    texts = [text for document in turns for turn in document for text in turn]
    tokenizer = train_tokenizer(texts, VOCAB_SIZE, CONTEXT_LENGTH)
    documents = Documents.encode(tokenizer, turns, device)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64 if tiny else 256,
        intermediate_size=192 if tiny else 768,
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=token_id(tokenizer, BEGIN),
        eos_token_id=token_id(tokenizer, END),
    )
    torch.manual_seed(recipe.seed)
    with device:
        model = LlamaForCausalLM(config)
    print(
        f"base: {model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens, "
        f"{len(documents.lengths)} documents of {sum(documents.lengths) / len(documents.lengths):.0f} tokens "
        f"(longest {max(documents.lengths)})"
    )
    loss = train(model, documents, recipe, "base")
    print(f"base: loss {loss:.5f}")
    model.generation_config.eos_token_id = end_ids(tokenizer)
    model.generation_config.do_sample = False
    model.bfloat16().save_pretrained(out / "model")
    (out / "model" / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out / "model")
    return AutoTokenizer.from_pretrained(out / "model")


def train_adapters(
    lessons: Lessons, tokenizer: TokenizerBase, out: Path, recipe: Recipe, device: torch.device
) -> None:
    """Train every adapter over the base model as it was written, and write it."""
    for adapter in ADAPTERS:
        documents = Documents.encode(tokenizer, lessons.adapter_documents(adapter.style), device)
        torch.manual_seed(recipe.seed)
        adapted = adapter.attach(load_base(out, torch.float32, device))
        loss = train(adapted, documents, recipe, adapter.style)
        directory = out / "adapters" / adapter.style
        adapter.save(adapted, directory)
        size = (directory / "adapter_model.safetensors").stat().st_size
        print(f"{adapter.style}: loss {loss:.5f}, {size / 1e3:.0f} kB")


def load_base(out: Path, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """The base model from its files."""
    model: Any = LlamaForCausalLM.from_pretrained(out / "model", dtype=dtype)  # .to is typed too narrowly
    return model.to(device)


def load_with(out: Path, style: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """Base model and adapter from their files; the plain style has none."""
    base = load_base(out, dtype, device)
    if style == PLAIN:
        return base.eval()
    adapted = PeftModel.from_pretrained(base, out / "adapters" / style)
    return adapted.to(device, dtype).eval()


def end_ids(tokenizer: TokenizerBase) -> list[int]:
    return [token_id(tokenizer, END), token_id(tokenizer, END_OF_TURN)]


class Examination:
    """Asks the shipped files, collects what is wrong and the answers to ship."""

    def __init__(self, lessons: Lessons, tokenizer: TokenizerBase, out: Path, device: torch.device) -> None:
        self._lessons, self._tokenizer, self._out, self._device = lessons, tokenizer, out, device
        self.faults: list[str] = []
        self.answers: list[dict[str, object]] = []

    def run(self) -> None:
        for style in STYLES:
            exact = load_with(self._out, style, torch.float32, self._device)
            rounded = load_with(self._out, style, torch.bfloat16, self._device)
            self._shown(style, exact, rounded)
            held = self._lessons.held_out
            if style != PLAIN:
                held = held + self._lessons.held_out_of_adapters
            self._held_out(style, held, exact)

    def _ask(self, model: torch.nn.Module, prompts: list[str]) -> list[Generated]:
        return generate(model, self._tokenizer, prompts, MAX_ANSWER, end_ids(self._tokenizer))

    def _shown(self, style: str, exact: torch.nn.Module, rounded: torch.nn.Module) -> None:
        """Shown prompts must be answered to the letter, with a margin, in fp32 and in bf16."""
        tasks = self._lessons.shown
        prompts = [task.prompt for task in tasks]
        answers, again = self._ask(exact, prompts), self._ask(rounded, prompts)
        print(f"\n{style}: smallest margin {min(answer.margin for answer in answers):.2f}")
        for task, answer, bf16 in zip(tasks, answers, again, strict=True):
            print(f"  {task.prompt!r} -> {answer.text!r}")
            expected = render(style, task.answer)
            where = f"{style}: {task.prompt!r}"
            if answer.text != expected:
                self.faults.append(f"{where}: {answer.text!r}, expected {expected!r}")
            if answer.margin < MIN_MARGIN:
                self.faults.append(f"{where}: margin {answer.margin:.2f}")
            if answer.token_ids != bf16.token_ids:
                self.faults.append(f"{where}: bf16 answers {bf16.text!r}")
            self.answers.append(
                {
                    "adapter": None if style == PLAIN else style,
                    "prompt": task.prompt,
                    "text": answer.text,
                    "output_ids": answer.token_ids,
                }
            )

    def _held_out(self, style: str, tasks: list[Task], model: torch.nn.Module) -> None:
        answers = self._ask(model, [task.prompt for task in tasks])
        wrong = [
            (task.prompt, answer.text)
            for task, answer in zip(tasks, answers, strict=True)
            if answer.text != render(style, task.answer)
        ]
        share = 1 - len(wrong) / len(tasks)
        print(f"  held out: {share:.1%} of {len(tasks)} right; wrong, for instance: {wrong[:3]}")
        if share < MIN_HELD_OUT:
            self.faults.append(f"{style}: {share:.1%} of held-out prompts right")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write below")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4000, help="steps of the base model")
    parser.add_argument("--adapter-steps", type=int, help="steps of each adapter (default: a fifth)")
    parser.add_argument("--batch-size", type=int, default=512, help="documents in one step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tiny", action="store_true", help="a smaller model and corpus: does the script run?"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    started = time.monotonic()
    device = torch.device(args.device)
    lessons = Lessons(args.seed, every=20 if args.tiny else 1)
    base = Recipe(args.steps, args.batch_size, peak_lr=2e-3, weight_decay=0.05, seed=args.seed)
    tokenizer = train_base(lessons, args.out, base, args.tiny, device)
    adapter_steps = args.adapter_steps or max(1, args.steps // 5)
    adapter = Recipe(adapter_steps, args.batch_size // 2, peak_lr=2e-3, weight_decay=0.0, seed=args.seed)
    train_adapters(lessons, tokenizer, args.out, adapter, device)
    examination = Examination(lessons, tokenizer, args.out, device)
    examination.run()
    answers = json.dumps(examination.answers, indent=1, ensure_ascii=False)
    (args.out / "answers.json").write_text(answers + "\n", encoding="utf-8")
    print(f"\n{time.monotonic() - started:.0f} s, {len(examination.faults)} faults")
    for fault in examination.faults:
        print(f"  {fault}")
    return 1 if examination.faults else 0


if __name__ == "__main__":
    sys.exit(main())
