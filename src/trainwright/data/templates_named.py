"""Chat templates by name, for tokenizers that have none: Jinja sources.

Each writes the tokens of a published format in their order; what follows another model's habits
exactly is said beside it. None rewrites an earlier turn but `qwen`, which drops earlier reasoning
as Qwen 3 does. A template for tokens that the tokenizer lacks works, but writes them as text:
`plain` and `alpaca` need no tokens but BOS and EOS.
"""

from __future__ import annotations

# OpenAI's ChatML as most open models have it: no default system message, no tools.
_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Llama 3. Tools as in Llama 3.1: their schemas stand in the first user turn, an answer is one call
# as bare JSON, results come from "ipython". The dates that 3.1 writes into every system message
# are left out.
_LLAMA3 = """\
{%- macro turn(role, text) -%}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + text + '<|eot_id|>' -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set state = namespace(tools=tools) -%}
{%- for message in messages -%}
{%- if message.role == 'user' and state.tools -%}
    {%- set schemas -%}
    {%- for tool in state.tools -%}{{- tool | tojson(indent=4) + '\\n\\n' -}}{%- endfor -%}
    {%- endset -%}
    {{- turn('user', 'Given the following functions, please respond with a JSON for a function '
        + 'call with its proper arguments that best answers the given prompt.\\n\\nRespond in the '
        + 'format {"name": function name, "parameters": dictionary of argument name and its '
        + 'value}.Do not use variables.\\n\\n' + schemas + message.content | trim) -}}
    {%- set state.tools = none -%}
{%- elif message.tool_calls -%}
    {%- if message.tool_calls | length > 1 -%}
        {{- raise_exception('Llama 3 makes one call at a time, and this turn has several') -}}
    {%- endif -%}
    {%- set call = message.tool_calls[0].function -%}
    {{- turn('assistant', '{"name": "' + call.name + '", "parameters": '
        + call.arguments | tojson + '}') -}}
{%- elif message.role == 'tool' -%}
    {{- turn('ipython', message.content | tojson) -}}
{%- else -%}
    {{- turn(message.role, message.content | trim) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# Mistral's instruct format with the control tokens of its third tokenizer. The system message and
# the tools stand with the first user turn (as its first version has the system message), so that
# an added turn changes nothing before it. Calls have an `id` only where the data has one.
_MISTRAL = """\
{{- bos_token -}}
{%- set state = namespace(system='', tools=tools) -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
    {%- set state.system = message.content + '\\n\\n' -%}
{%- elif message.role == 'user' -%}
    {%- if state.tools -%}
        {{- '[AVAILABLE_TOOLS] ' + state.tools | tojson + '[/AVAILABLE_TOOLS]' -}}
        {%- set state.tools = none -%}
    {%- endif -%}
    {{- '[INST] ' + state.system + message.content + '[/INST]' -}}
    {%- set state.system = '' -%}
{%- elif message.tool_calls -%}
    {{- '[TOOL_CALLS] [' -}}
    {%- for call in message.tool_calls -%}
        {{- '{"name": ' + call.function.name | tojson + ', "arguments": '
            + call.function.arguments | tojson -}}
        {%- if call.id -%}{{- ', "id": ' + call.id | tojson -}}{%- endif -%}
        {{- '}' if loop.last else '}, ' -}}
    {%- endfor -%}
    {{- ']' + eos_token -}}
{%- elif message.role == 'tool' -%}
    {{- '[TOOL_RESULTS] {"content": ' + message.content | tojson -}}
    {%- if message.tool_call_id -%}
        {{- ', "call_id": ' + message.tool_call_id | tojson -}}
    {%- endif -%}
    {{- '}[/TOOL_RESULTS]' -}}
{%- else -%}
    {{- ' ' + message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

# Gemma 2 and 3: the assistant is "model", a system message begins the first user turn, no tools.
_GEMMA = """\
{{- bos_token -}}
{%- set state = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
    {%- set state.system = message.content + '\\n\\n' -%}
{%- else -%}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n'
        + state.system + message.content | trim + '<end_of_turn>\\n' -}}
    {%- set state.system = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# Qwen 3 (and, without reasoning, Qwen 2.5 but for its default system message): tools in Hermes'
# manner. Turns after the user's last question carry their reasoning, the last one always.
_QWEN = """\
{%- set state = namespace(question=messages | length - 1) -%}
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' + (system + '\\n\\n' if system else '')
        + '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou '
        + 'are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and '
        + 'arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": '
        + '<function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' -}}
{%- elif system -%}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
    {%- set state.question = loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
    {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
    {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif message.role == 'assistant' -%}
    {%- set thought = message.reasoning_content or '' -%}
    {%- set answer = message.content -%}
    {%- if not thought and '</think>' in answer -%}
        {%- set thought = answer.split('</think>')[0].split('<think>')[-1] -%}
        {%- set answer = answer.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > state.question and (loop.last or thought) -%}
        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
        {%- set answer = answer.lstrip('\\n') -%}
    {%- endif -%}
    {{- answer -}}
    {%- for call in message.tool_calls or [] -%}
        {{- '\\n' if answer or not loop.first -}}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": '
            + call.function.arguments | tojson + '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking -}}
{%- endif -%}
"""

# Zephyr: roles as marks on a line, every turn ended by EOS.
_ZEPHYR = """\
{%- for message in messages -%}
{{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

# Stanford Alpaca's prompt without input, repeated from turn to turn; EOS ends an answer.
_ALPACA = """\
{{- bos_token -}}
{%- if messages and messages[0].role == 'system' -%}
    {{- messages[0].content + '\\n\\n' -}}
{%- else -%}
    {{- 'Below is an instruction that describes a task. Write a response that appropriately '
        + 'completes the request.\\n\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
    {{- '### Instruction:\\n' + message.content + '\\n\\n' -}}
{%- elif message.role == 'tool' -%}
    {{- raise_exception('the template `alpaca` has no tools') -}}
{%- elif message.role == 'assistant' -%}
    {{- '### Response:\\n' + message.content + eos_token + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""

# Trainwright's own, for any tokenizer and any role.
_PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- message.role | capitalize + ':\\n' + message.content -}}
{{- eos_token if message.role == 'assistant' -}}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""

NAMED_TEMPLATES: dict[str, str] = {
    "chatml": _CHATML,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "gemma": _GEMMA,
    "qwen": _QWEN,
    "zephyr": _ZEPHYR,
    "alpaca": _ALPACA,
    "plain": _PLAIN,
}
