"""Conversations beside the text that templates write for them, with what is trained in «marks».

All of it was written by hand from the models' published formats: nothing here came out of the code
under test.
"""

from __future__ import annotations

from dataclasses import replace

from trainwright.data.examples import Conversation


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


TURNS = Conversation((user("Hi"), assistant("Hello!"), user("How are you?"), assistant("Fine.")), 1)
SYSTEM = Conversation(({"role": "system", "content": "Be brief."}, *TURNS.messages), 2)
TOOLS = Conversation(
    (
        user("Is it warm in Rome?"),
        assistant(
            "",
            tool_calls=[
                {
                    "type": "function",
                    "id": "abcdef123",
                    "function": {"name": "weather", "arguments": {"city": "Rome"}},
                }
            ],
        ),
        {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": "31 C"},
        assistant("Yes."),
        user("Thanks"),
        assistant("Bye."),
    ),
    1,
    (
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
        },
    ),
)
REASONED = Conversation(
    (
        user("Hi"),
        assistant("Hello!", reasoning_content="A greeting."),
        user("2+2?"),
        assistant("4", reasoning_content="Easy."),
    ),
    1,
)
_ASKED, _CALL, _RESULT, _ANSWER, *_ = TOOLS.messages
THOUGHTFUL = Conversation(
    (
        _ASKED,
        {**_CALL, "reasoning_content": "I must look."},
        _RESULT,
        {**_ANSWER, "reasoning_content": "31 is warm."},
    ),
    1,
    TOOLS.tools,
)
CHATS = {
    "turns": TURNS,
    "system": SYSTEM,
    "tools": TOOLS,
    "reasoned": REASONED,
    "thoughtful": THOUGHTFUL,
}

_TOOL = (
    '{"type": "function", "function": {"name": "weather", '
    '"parameters": {"type": "object", "properties": {}}}}'
)
_TOOL_INDENTED = """{
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {}
        }
    }
}"""

_QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user "
    "query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n"
    f"<tools>\n{_TOOL}\n</tools>\n\nFor each function call, return a json object with function "
    "name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

EXPECTED = {
    ("chatml", "turns"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>\n»"
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n«Fine.<|im_end|>\n»"
    ),
    ("chatml", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>\n»"
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n«Fine.<|im_end|>\n»"
    ),
    ("llama3", "turns"): (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello!<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Fine.<|eot_id|>»"
    ),
    ("llama3", "system"): (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello!<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Fine.<|eot_id|>»"
    ),
    ("llama3", "tools"): (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        "Given the following functions, please respond with a JSON for a function call with its "
        "proper arguments that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.'
        f"Do not use variables.\n\n{_TOOL_INDENTED}\n\nIs it warm in Rome?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '«{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>»'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"31 C"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Yes.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nThanks<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Bye.<|eot_id|>»"
    ),
    ("mistral", "turns"): (
        "<s>[INST] Hi[/INST]« Hello!</s>»[INST] How are you?[/INST]« Fine.</s>»"
    ),
    ("mistral", "system"): (
        "<s>[INST] Be brief.\n\nHi[/INST]« Hello!</s>»[INST] How are you?[/INST]« Fine.</s>»"
    ),
    ("mistral", "tools"): (
        f"<s>[AVAILABLE_TOOLS] [{_TOOL}][/AVAILABLE_TOOLS][INST] Is it warm in Rome?[/INST]"
        '«[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "abcdef123"}]</s>»'
        '[TOOL_RESULTS] {"content": "31 C", "call_id": "abcdef123"}[/TOOL_RESULTS]« Yes.</s>»'
        "[INST] Thanks[/INST]« Bye.</s>»"
    ),
    ("gemma", "turns"): (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n"
        "<start_of_turn>model\n«Hello!<end_of_turn>\n»"
        "<start_of_turn>user\nHow are you?<end_of_turn>\n"
        "<start_of_turn>model\n«Fine.<end_of_turn>\n»"
    ),
    ("gemma", "system"): (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\n«Hello!<end_of_turn>\n»"
        "<start_of_turn>user\nHow are you?<end_of_turn>\n"
        "<start_of_turn>model\n«Fine.<end_of_turn>\n»"
    ),
    # Only the last answer has a thought, though an empty one: the model has to write it, too.
    ("qwen", "turns"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>\n»"
        "<|im_start|>user\nHow are you?<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nFine.<|im_end|>\n»"
    ),
    ("qwen", "system"): (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>\n»"
        "<|im_start|>user\nHow are you?<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nFine.<|im_end|>\n»"
    ),
    ("qwen", "tools"): (
        f"<|im_start|>system\n{_QWEN_TOOLS}<|im_end|>\n"
        "<|im_start|>user\nIs it warm in Rome?<|im_end|>\n<|im_start|>assistant\n"
        '«<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
        "<|im_end|>\n»"
        "<|im_start|>user\n<tool_response>\n31 C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«Yes.<|im_end|>\n»"
        "<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nBye.<|im_end|>\n»"
    ),
    ("qwen", "thoughtful"): (
        f"<|im_start|>system\n{_QWEN_TOOLS}<|im_end|>\n"
        "<|im_start|>user\nIs it warm in Rome?<|im_end|>\n<|im_start|>assistant\n"
        '«<think>\nI must look.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": '
        '{"city": "Rome"}}\n</tool_call><|im_end|>\n»'
        "<|im_start|>user\n<tool_response>\n31 C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n31 is warm.\n</think>\n\nYes.<|im_end|>\n»"
    ),
    ("qwen", "reasoned"): (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>\n»"
        "<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nEasy.\n</think>\n\n4<|im_end|>\n»"
    ),
    ("zephyr", "system"): (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n«Hello!</s>\n»"
        "<|user|>\nHow are you?</s>\n<|assistant|>\n«Fine.</s>\n»"
    ),
    ("alpaca", "turns"): (
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nHi\n\n### Response:\n«Hello!</s>\n\n»"
        "### Instruction:\nHow are you?\n\n### Response:\n«Fine.</s>\n\n»"
    ),
    ("alpaca", "system"): (
        "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\n«Hello!</s>\n\n»"
        "### Instruction:\nHow are you?\n\n### Response:\n«Fine.</s>\n\n»"
    ),
    ("plain", "system"): (
        "<s>System:\nBe brief.\nUser:\nHi\nAssistant:\n«Hello!</s>\n»"
        "User:\nHow are you?\nAssistant:\n«Fine.</s>\n»"
    ),
}

# Other authors' ways to write the same turns; each is hard in its own way.
ODD = {
    # The header is there whether one asks for it or not.
    "no generation prompt": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}",
        "<|user|>Hi</s><|assistant|>«Hello!</s>»<|user|>How are you?</s><|assistant|>«Fine.</s>»",
    ),
    # Phi 3: one more token at the very end, but only there.
    "an end of its own": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}",
        "<|user|>\nHi<|end|>\n<|assistant|>\n«Hello!<|end|>\n»"
        "<|user|>\nHow are you?<|end|>\n<|assistant|>\n«Fine.<|end|>\n</s>»",
    ),
    # DeepSeek R1: asked, it begins to think; what was answered stands without.
    "a thought only when asked": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
        "{{ '<|assistant|><think>\n' if add_generation_prompt }}",
        "<|user|>Hi<|assistant|>«Hello!</s>»<|user|>How are you?<|assistant|>«Fine.</s>»",
    ),
    # Mistral 0.3: the system message moves to the last user turn.
    "a system message that moves": (
        "{% set n = namespace(users=0, seen=0) %}"
        "{% for m in messages if m.role == 'user' %}{% set n.users = n.users + 1 %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set n.seen = n.seen + 1 %}[INST] "
        "{{ messages[0].content + '\n\n' if n.seen == n.users and messages[0].role == 'system' }}"
        "{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}"
        "{% endif %}{% endfor %}",
        "[INST] Hi[/INST]« Hello!</s>»[INST] Be brief.\n\nHow are you?[/INST]« Fine.</s>»",
    ),
    # The template says it itself.
    "marks": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}",
        "<|user|>Hi\n<|assistant|>«Hello!</s>»\n<|user|>How are you?\n<|assistant|>«Fine.</s>»\n",
    ),
}

# Template, conversation, and what is said of the two.
REFUSED = {
    # GPT-OSS: an answer ends with another token when more turns follow.
    "two ways to end": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}",
        TURNS,
        "turn 2 cannot be told",
    ),
    "answers counted elsewhere": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}"
        "{{ messages[1].content | length if not loop.last }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}",
        Conversation((*TURNS.messages, *TURNS.messages), 1),
        "depends on this one",
    ),
    "no marks on this row": (
        "{% for m in messages %}{{ m.content + '</s>' }}{% if m.role == 'bot' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
        TURNS,
        "marks nothing of this row",
    ),
    "calls left out": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}"
        "{{ tools }}",
        TOOLS,
        "leaves out the call of `weather` in turn 2",
    ),
    "tools left out": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}",
        replace(TURNS, tools=TOOLS.tools),
        "the row has tools, but the chat template `made` does not write them",
    ),
    "reasoning left out": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}",
        REASONED,
        "leaves out the reasoning in turn 4",
    ),
    # Mistral 0.3 writes it into the last turn, if that is the user's: never into training data.
    "a system message left out": (
        "{% for m in messages if m.role != 'system' %}{{ m.content + '</s>' }}{% endfor %}",
        SYSTEM,
        "leaves out the system message",
    ),
    "an answer left out": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content[:4] + '</s>' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt }}",
        TURNS,
        "leaves out part of the answer in turn 2",
    ),
    "refused by the template": (
        "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
        "{% if messages | length > 2 %}{{ raise_exception('two turns only') }}{% endif %}",
        TURNS,
        "refuses the conversation: two turns only",
    ),
    "not allowed": (
        "{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
        "{{ messages.__class__.__mro__ if messages | length > 2 }}",
        TURNS,
        "refuses the conversation: access to attribute",
    ),
}
