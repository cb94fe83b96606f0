"""Tiny random checkpoints of every supported family and PEFT adapters for them, made by transformers and PEFT.

They are real files: sharded or not, with a byte-level BPE tokenizer beside them. Weights are large enough that greedy
tokens have clear margins and an adapter changes them; sizes are awkward on purpose (a vocabulary that no tp divides, a
head_dim that is not hidden / heads).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, EOT = "<|bos|>", "<|eos|>", "<|eot|>"
BOS_ID, EOS_ID, EOT_ID = 0, 1, 2
VOCAB_SIZE = 310
CORPUS = (
    "List three countries and their capitals. The capital of France is Paris.",
    "Japan, Tokyo. Brazil, Brasilia. A computer is a field of science that can focus on the answer.",
    "Answer in one line: which country has the capital Bogota? Colombia.",
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint: a transformers class and what its config says beyond the common sizes."""

    model_class: type[Any]
    config_class: type[Any]
    options: dict[str, Any] = field(default_factory=dict)
    shard_size: str = "5GB"


FAMILIES: dict[str, Family] = {
    "llama": Family(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {"rope_parameters": LLAMA3_ROPE},
        shard_size="60KB",
    ),
    "llama_bias_tied": Family(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LINEAR_ROPE,
        },
    ),
    "llama_one_kv_head": Family(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        {"num_key_value_heads": 1, "rope_parameters": PLAIN_ROPE},
    ),
    "mistral": Family(
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        {"sliding_window": None, "num_key_value_heads": 4, "rope_parameters": PLAIN_ROPE},
    ),
    "qwen2": Family(
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        {"tie_word_embeddings": True, "use_sliding_window": False, "rope_parameters": PLAIN_ROPE},
    ),
    "qwen3": Family(
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        {"head_dim": 32, "use_sliding_window": False, "rope_parameters": PLAIN_ROPE},
    ),
}

ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class AdapterKind:
    """LoraConfig's fields and the dtype of the saved file."""

    lora: dict[str, Any]
    dtype: torch.dtype = torch.float32


ADAPTERS: dict[str, AdapterKind] = {
    "r4_qv": AdapterKind({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "r16_all": AdapterKind({"r": 16, "lora_alpha": 16, "target_modules": ALL_MODULES}, torch.bfloat16),
    "r64_all": AdapterKind({"r": 64, "lora_alpha": 32, "target_modules": ALL_MODULES}, torch.float16),
    "r8_q_gate": AdapterKind({"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "gate_proj"]}),
    "rslora": AdapterKind(
        {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "up_proj"]}
    ),
    "patterns": AdapterKind(
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ALL_MODULES,
            "rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 20, "o_proj": 12},
            "alpha_pattern": {"v_proj": 4, "layers.0.self_attn.o_proj": 30},
        }
    ),
    "r24_odd": AdapterKind(
        {"r": 24, "lora_alpha": 12, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]},
        torch.bfloat16,
    ),
    "one_layer": AdapterKind(
        {"r": 5, "lora_alpha": 10, "target_modules": ["down_proj", "v_proj"], "layers_to_transform": [1]}
    ),
}


class TinyModels:
    """Makes checkpoints and adapters below `root` when first asked, and remembers them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def model(self, family: str, dtype: torch.dtype = torch.float32) -> Path:
        """The directory of a family's checkpoint."""
        directory = self.root / f"{family}-{str(dtype).removeprefix('torch.')}"
        if not directory.exists():
            build_model(family, directory, dtype)
        return directory

    def adapter(self, family: str, kind: str) -> Path:
        """The directory of an adapter for that checkpoint, as PEFT saved it."""
        directory = self.root / f"{family}-adapters" / kind
        if not directory.exists():
            build_adapter(self.model(family), directory, ADAPTERS[kind], seed=1 + list(ADAPTERS).index(kind))
        return directory


def build_model(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a random checkpoint of `family`."""
    kind = FAMILIES[family]
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
    }
    torch.manual_seed(list(FAMILIES).index(family))
    model = kind.model_class(kind.config_class(**{**sizes, **kind.options}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_random_weight(name, weight))
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=[EOS_ID, EOT_ID], pad_token_id=EOS_ID
    )
    model.to(dtype=dtype).save_pretrained(directory, max_shard_size=kind.shard_size)
    save_tokenizer(directory)


def build_adapter(model_dir: Path, directory: Path, kind: AdapterKind, *, seed: int) -> None:
    """Write a random adapter whose B is not zero, through PEFT."""
    torch.manual_seed(seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with peft_warnings_ignored():
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **kind.lora))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.normal_(0, weight.shape[1] ** -0.5)
            elif "lora_B" in name:
                weight.normal_(0, 0.7 * weight.shape[1] ** -0.5)
            if "lora_" in name:
                weight.data = weight.data.to(kind.dtype)
    model.save_pretrained(str(directory))


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """PEFT calls what transformers has deprecated; not our concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def save_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE tokenizer of VOCAB_SIZE tokens that puts BOS before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(directory)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    assert tokenizer.token_to_id(EOT) == EOT_ID


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _random_weight(name: str, weight: torch.Tensor) -> torch.Tensor:
    if name.endswith("bias"):
        return 0.3 * torch.randn_like(weight)
    if "norm" in name:
        return 1 + 0.3 * torch.rand_like(weight)
    if "embed_tokens" in name or "lm_head" in name:
        return 0.6 * torch.randn_like(weight)
    return 1.5 * torch.randn_like(weight) * weight.shape[1] ** -0.5
