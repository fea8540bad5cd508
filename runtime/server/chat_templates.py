"""Chat templates by name, for models that bring none: `--chat-template llama3`.

Each is its family's own published format without tools. A file or a template written out can be
given instead; what is meant is told by its look.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qtool.errors import UnknownName, UsageError

_GENERATE = "{% if add_generation_prompt %}"

CHAT_TEMPLATES: Mapping[str, str] = {
    "chatml": "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    f"{_GENERATE}<|im_start|>assistant\n{{% endif %}}",
    "llama3": "{{ bos_token }}{% for message in messages %}<|start_header_id|>"
    "{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    f"{{% endfor %}}{_GENERATE}<|start_header_id|>assistant<|end_header_id|>\n\n{{% endif %}}",
    "llama2": "{% set system = namespace(text='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set system.text = "
    "'<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
    "{% elif message['role'] == 'user' %}{{ bos_token }}[INST] {{ system.text }}"
    "{{ message['content'] }} [/INST]{% set system.text = '' %}"
    "{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}{% set system = namespace(text='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set system.text = message['content'] + '\n\n' %}"
    "{% elif message['role'] == 'user' %}[INST] {{ system.text }}{{ message['content'] }}[/INST]"
    "{% set system.text = '' %}{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}",
    "gemma": "{{ bos_token }}{% set system = namespace(text='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set system.text = message['content'] + '\n\n' %}"
    "{% else %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ system.text }}{{ message['content'] | trim }}<end_of_turn>\n{% set system.text = '' %}"
    f"{{% endif %}}{{% endfor %}}{_GENERATE}<start_of_turn>model\n{{% endif %}}",
    "phi3": "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    f"<|end|>\n{{% endfor %}}{_GENERATE}<|assistant|>\n{{% endif %}}",
    "zephyr": "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    f"{{{{ eos_token }}}}\n{{% endfor %}}{_GENERATE}<|assistant|>\n{{% endif %}}",
    "vicuna": "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'] }}\n\n{% elif message['role'] == 'user' %}USER: "
    "{{ message['content'] }}\n{% else %}ASSISTANT: {{ message['content'] }}{{ eos_token }}\n"
    f"{{% endif %}}{{% endfor %}}{_GENERATE}ASSISTANT:{{% endif %}}",
    "alpaca": "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'] }}\n\n{% elif message['role'] == 'user' %}### Instruction:\n"
    "{{ message['content'] }}\n\n{% else %}### Response:\n{{ message['content'] }}"
    f"{{{{ eos_token }}}}\n\n{{% endif %}}{{% endfor %}}{_GENERATE}### Response:\n{{% endif %}}",
}


def find_chat_template(given: str) -> str:
    """The Jinja source: of a built-in name, of a file, or as it is written."""
    if given in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[given]
    if "{{" in given or "{%" in given:
        return given
    path = Path(given)
    if path.is_file():
        return path.read_text()
    if path.suffix or len(path.parts) > 1:
        raise UsageError(f"--chat-template {given}: there is no such file")
    raise UnknownName("chat template", given, CHAT_TEMPLATES)
