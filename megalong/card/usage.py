"""What does somebody type to use the model? Code for transformers and llama.cpp that runs as it is printed."""

from __future__ import annotations

_PIPELINE = """```python
from transformers import pipeline

generate = pipeline("text-generation", model="{name}")
print(generate("The needle is", max_new_tokens=20)[0]["generated_text"])
```"""
_CHAT = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
messages = [{{"role": "user", "content": "Where is the needle?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
_PLAIN = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
inputs = tokenizer("The needle is", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```"""
_LLAMA_CPP = """```
python tools/convert.py hf-to-gguf {name} {name}.gguf --type q8_0
llama-cli -m {name}.gguf -c {context} -p "The needle is"
```"""
_CONTEXT = 32768


def usage(name: str, has_chat: bool, window: int) -> str:
    """The section's text.

    Args:
        name: folder or repository of the model.
        has_chat: its tokenizer has a chat template.
        window: tokens.
    """
    memory = (
        f"The keys and values of {window:,} tokens need memory of their own; `-c` is how many llama.cpp makes room for."
    )
    parts = [
        "With transformers, wherever the model lies:",
        _PIPELINE,
        _CHAT if has_chat else _PLAIN,
        "With llama.cpp, made by megalong:",
        _LLAMA_CPP,
    ]
    text = "\n\n".join(parts).format(name=name, context=min(window, _CONTEXT))
    without = "" if has_chat else "\n\nIt has no chat template: it continues texts."
    return f"{text}\n\n{memory}{without}"
