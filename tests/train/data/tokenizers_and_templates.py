"""Tokenizers trained here, and the shapes of public chat templates, written anew."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<|user|>",
    "<|assistant|>", "<|end|>",
]  # fmt: skip

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
        "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "phi3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}"
        "{% else %} ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "thinking": (  # reasoning of all but the last turns is left out
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not "
        "loop.last and '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "prefilled": (  # its generation prompt is not how it writes a turn
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "always_asks": (  # Llama 3's first one: a header ends it, wanted or not
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    "always_asks_in_words": (
        "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}### assistant: "
    ),
    "calls_if_none": (  # as DeepSeek's: joins strings, and writes a call only instead of words
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% elif m.role == 'assistant' and m.content is none %}<|assistant|>{% for c in "
        "m.tool_calls %}{{ 'CALL ' + c.function.name + ' ' + c.function.arguments }}{% endfor %}"
        "</s>{% elif m.role == 'assistant' and m.content is not none %}"
        "<|assistant|>{{ m.content + '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "calls_in_json": (  # fails on a content that is none, as Qwen 3's does
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "calls_if_absent": (  # prints what content holds, if there is one
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is defined %}"
        "{{ m.content }}{% else %}{{ m.tool_calls[0].function }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ).replace(
        "{{ m.tool_calls[0].function }}",
        "{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments }}",
    ),
    "calls_by_item": (  # as GLM's: walks through the arguments
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% for k, v in "
        "c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "two_roles": (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "thoughts": (  # of answers that nobody has answered yet
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and "
        "m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. user assistant system model USER: ASSISTANT:",
    "What is two plus two?\n\nIt is four, and four is five minus one.\n",
    "def add(a, b):\n    return a + b\n",
] * 20


def byte_level(**names):
    """A byte-level BPE tokenizer that puts no BOS, as Qwen's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=[AddedToken(s, special=True) for s in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{"bos_token": "<s>", "eos_token": "</s>", **names}
    )


def metaspace(**names):
    """A BPE tokenizer in the manner of SentencePiece, which puts BOS, as Llama's and Gemma's."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    core.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=800, show_progress=False,
            special_tokens=[AddedToken(s, special=True) for s in ["<unk>", *SPECIAL]]
            + [f"<0x{byte:02X}>" for byte in range(256)],
        ),
    )  # fmt: skip
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{"bos_token": "<s>", "eos_token": "</s>", **names}
    )
