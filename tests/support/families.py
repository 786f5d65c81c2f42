"""Chat templates in the manner of the families that call functions and think, cut down to what matters here."""

from __future__ import annotations

_ROLES = "<s>{%- for message in messages %}[{{ message.role }}]{{ message.content }}\n{%- endfor %}"

HERMES = (
    _ROLES
    + """
{%- if tools %}# Tools
{%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
Return each call as <tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>
{% endif %}
{%- for message in messages %}{% for call in message.tool_calls %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}}
</tool_call>
{%- endfor %}{% endfor %}
{%- if add_generation_prompt %}[assistant]
{% endif %}"""
)
"""Qwen 2.5 and the Hermes models: calls between `<tool_call>` and `</tool_call>`."""

THINKING = HERMES + (
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
"""Qwen 3: as `HERMES`, and the model writes its thoughts between `<think>` and `</think>` unless told not to."""

OPENED = HERMES + "<think>\n"
"""QwQ and DeepSeek R1: the prompt opens the thoughts."""

LLAMA3 = (
    _ROLES
    + """
{%- if tools %}{%- for tool in tools %}{{ tool | tojson }}{% endfor %}
Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.
{%- endif %}
{%- for message in messages %}{% for call in message.tool_calls %}
{{- '<|python_tag|>{"name": "' + call.function.name + '", "parameters": ' + (call.function.arguments | tojson) }}}
{%- endfor %}{% endfor %}[assistant]
"""
)
"""Llama 3.1: JSON with `parameters`, with or without `<|python_tag|>`."""

MISTRAL = (
    _ROLES
    + """
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}{% if message.tool_calls %}[TOOL_CALLS][
{%- for call in message.tool_calls %}{% if call.id | length != 9 %}{{ raise_exception("ids have 9 characters") }}
{%- endif %}{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{%- endfor %}]{% endif %}{% endfor %}[assistant]
"""
)
"""Mistral: a list of calls after `[TOOL_CALLS]`."""

CHANNELS = (
    "{%- for message in messages %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endfor %}"
    "{%- for tool in tools or [] %}type {{ tool.function.name }} = (_: {{ tool.function.parameters | tojson }});"
    "{% endfor %}Reasoning: {{ reasoning_effort | default('medium') }}"
    "{%- for message in messages %}{% if message.thinking %}<|channel|>analysis<|message|>{{ message.thinking }}<|end|>"
    "{% endif %}{% endfor %}<|start|>assistant"
)
"""gpt-oss: everything is a message in a channel."""

CHANNEL_TOKENS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
