"""Stock chat templates with `{% generation %}` marks: what an assistant says, up to and with the token that ends it.

A template is recognised by its SHA-256 and marked by a few replacements in its own text. The marked one renders the
same text in every conversation. A mark begins where the generation prompt ends, and what a template writes after the
end token (a line break, mostly) lies outside of it, because no model would ever say it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

MARKS = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Stock:
    """A template that models come with.

    Attributes:
      sha256: of its text, without a line break at the end.
      edits: what stands in it once -> what takes its place.
    """

    sha256: str
    edits: tuple[tuple[str, str], ...]


def mark(template: str) -> str | None:
    """The template with generation marks, if it is a stock one (or has marks); None where it is unknown."""
    if MARKS.search(template):
        return template
    digest = hashlib.sha256(template.removesuffix("\n").encode()).hexdigest()
    stock = next((each for each in STOCK.values() if each.sha256 == digest), None)
    if stock is None:
        return None
    for old, new in stock.edits:
        template = template.replace(old, new)
    return template


def _said(header: str, said: str, after: str = "", trim: str = "") -> str:
    """The output of an assistant's turn: header, what it says, and what comes after its end."""
    left, right = "{{" + trim, "{%" + trim
    rest = f"{left} {after} }}}}" if after else ""
    return f"{left} {header} }}}}{right} generation %}}{left} {said} }}}}{right} endgeneration %}}{rest}"


def _if_assistant(output: str, header: str, said: str, after: str = "", trim: str = "") -> tuple[str, str]:
    """An output that serves every role, and the same with the assistant's turn marked."""
    said, tag = _said(header, said, after, trim), "{%" + trim
    return output, f"{tag} if message['role'] == 'assistant' %}}{said}{tag} else %}}{output}{tag} endif %}}"


_CHATML_HEADER = r"'<|im_start|>assistant\n'"
_LLAMA_HEADER = r"'<|start_header_id|>assistant<|end_header_id|>\n\n'"
_LLAMA_TURN = _if_assistant(
    r"{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}",
    _LLAMA_HEADER,
    "message['content'] | trim + '<|eot_id|>'",
    trim="-",
)
_LLAMA_TOOL = '{%- elif message.role == "tool" or message.role == "ipython" %}'
# Qwen's turns with tool calls end here, before the answers of the tools.
_QWEN_END = (
    "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}",
    "        {{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}\n    {%- elif message.role == \"tool\" %}",
)
_PHI = (
    (
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
        _said(r"'<|assistant|>\n'", "message['content'] + '<|end|>'", r"'\n'"),
    ),
    (
        "{% else %}{{ eos_token }}{% endif %}",
        "{% elif messages[-1]['role'] == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ eos_token }}{% endif %}",
    ),
)

STOCK: dict[str, Stock] = {
    "smollm2": Stock(
        "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
        (
            _if_assistant(
                "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
                _CHATML_HEADER,
                "message['content'] + '<|im_end|>'",
                r"'\n'",
            ),
        ),
    ),
    "llama3": Stock(
        "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122",
        (
            (
                "{{ content }}{% endfor %}",
                "{% if message['role'] == 'assistant' %}{% set opening = (bos_token if loop.index0 == 0 else '') + "
                rf"{_LLAMA_HEADER} %}}{_said('opening', 'content[opening | length:]')}"
                "{% else %}{{ content }}{% endif %}{% endfor %}",
            ),
        ),
    ),
    "llama3_1": Stock(
        "93c0e9aa3629bbd77e68dbc0f5621f6e6b23aa8d74b932595cdb8d64684526d7",
        (
            _LLAMA_TURN,
            (
                "        {%- if builtin_tools is defined and tool_call.name in builtin_tools %}\n"
                rf"            {{{{- {_LLAMA_HEADER} -}}}}",
                rf"        {{{{- {_LLAMA_HEADER} -}}}}"
                "{%- generation %}{%- if builtin_tools is defined and tool_call.name in builtin_tools %}",
            ),
            ("{%- else  %}\n" + rf"            {{{{- {_LLAMA_HEADER} -}}}}", "{%- else %}"),
            (
                f"        {{%- endif %}}\n    {_LLAMA_TOOL}",
                f"        {{%- endif %}}{{%- endgeneration %}}\n    {_LLAMA_TOOL}",
            ),
        ),
    ),
    "llama3_2": Stock(
        "d82792f95932f1c9cef5c4bd992f171225e3bf8c7b609b4557c9e1ec96be819f",
        (
            _LLAMA_TURN,
            (rf"{{{{- {_LLAMA_HEADER} -}}}}", rf"{{{{- {_LLAMA_HEADER} -}}}}{{%- generation %}}"),
            (
                f'{{{{- "<|eot_id|>" }}}}\n    {_LLAMA_TOOL}',
                f'{{{{- "<|eot_id|>" }}}}{{%- endgeneration %}}\n    {_LLAMA_TOOL}',
            ),
        ),
    ),
    "qwen2_5": Stock(
        "55b2f4a26ac9ee719330a61a0c39d9e538b0e9322212f048326318cff4f8674a",
        (
            _if_assistant(
                r"{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}",
                _CHATML_HEADER,
                "message.content + '<|im_end|>'",
                r"'\n'",
                trim="-",
            ),
            ("{{- '<|im_start|>' + message.role }}", rf"{{{{- {_CHATML_HEADER} }}}}{{%- generation %}}"),
            (r"{{- '\n' + message.content }}", "{{- message.content }}"),
            (
                r"""{{- '\n<tool_call>\n{"name": "' }}""",
                r"{%- if message.content or not loop.first %}{{- '\n' }}{%- endif %}"
                r"""{{- '<tool_call>\n{"name": "' }}""",
            ),
            _QWEN_END,
        ),
    ),
    "qwen3": Stock(
        "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8",
        (
            (
                "{%- if loop.index0 > ns.last_query_index %}",
                "{%- set late, final = loop.index0 > ns.last_query_index, loop.last %}"
                rf"{{{{- {_CHATML_HEADER} }}}}{{%- generation %}}{{%- if late %}}",
            ),
            ("{%- if loop.last or (not loop.last and reasoning_content) %}", "{%- if final or reasoning_content %}"),
            (r"{{- '<|im_start|>' + message.role + '\n<think>\n' +", r"{{- '<think>\n' +"),
            (
                "            {%- else %}\n" + r"                {{- '<|im_start|>' + message.role + '\n' + content }}",
                "            {%- else %}\n                {{- content }}",
            ),
            (
                "        {%- else %}\n" + r"            {{- '<|im_start|>' + message.role + '\n' + content }}",
                "        {%- else %}\n            {{- content }}",
            ),
            _QWEN_END,
        ),
    ),
    "qwen3_instruct_2507": Stock(
        "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326",
        (
            (
                r"{{- '<|im_start|>' + message.role + '\n' + content }}",
                rf"{{{{- {_CHATML_HEADER} }}}}{{%- generation %}}{{{{- content }}}}",
            ),
            _QWEN_END,
        ),
    ),
    "gemma": Stock(
        "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6",
        (
            _if_assistant(
                "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}",
                r"'<start_of_turn>model\n'",
                "message['content'] | trim + '<end_of_turn>'",
                r"'\n'",
            ),
        ),
    ),
    "gemma3": Stock(
        "8d9e3a3c114fb2053ec500184677af4f7e5f8ec2582443cd535834e68b3ade29",
        (
            (
                '(first_user_prefix if loop.first else "") }}',
                '(first_user_prefix if loop.first else "") }}{%- set said -%}',
            ),
            (
                "    {%- endif -%}\n    {{ '<end_of_turn>\n' }}",
                "    {%- endif -%}{%- endset -%}{%- if role == 'model' -%}"
                "{%- generation -%}{{ said + '<end_of_turn>' }}"
                r"{%- endgeneration -%}{{ '\n' }}{%- else -%}{{ said + '<end_of_turn>\n' }}{%- endif -%}",
            ),
        ),
    ),
    "phi3": Stock("dcaee66df77bfbb789ec541fe713218da30225a526f1db97138fc39ee6dc56aa", _PHI),
    "phi3_5": Stock("78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90", _PHI),
}
