"""Small chat templates, each with one habit of a published family, and tokenizers that have them."""

from tokenizers import AddedToken

from minillm.models.tokenizers import byte_tokenizer

START = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CHATML = (
    START + "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Qwen 2.5: tools in the system message, calls as JSON between tags
TOOLS = (
    "{% if tools %}<|im_start|>system\n# Tools{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    + START
    + "{{ m.content }}{% for call in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Qwen 3: the finished turn begins with thoughts, be they empty; enable_thinking: false puts the empty ones into the prompt
THINKING = (
    START
    + "{% if loop.last and m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# as DeepSeek R1: the prompt opens the thoughts, and the finished turn has none
OPENED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# as DeepSeek R1: a turn calls tools where it has no content, and their arguments are joined as text
CALLING = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}<|assistant|>{% for call in m.tool_calls %}"
    "{{ '<call>' + call.type + ' ' + call.function.name + '\n' + call.function.arguments + '</call>' }}{% endfor %}<|im_end|>"
    "{% elif m.role == 'tool' %}<out>{{ m.content }}</out>"
    + OPENED.replace("{% for m in messages %}{% if", "{% elif", 1)
)
# as LLaVA: parts alone
PARTS = (
    START + "{% if m.content is not string %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Llama 3.2
DATED = "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML
# as Gemma 2: no system role
ALTERNATING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
# drops what a system message says
DEAF = CHATML.replace("{{ m.content }}", "{% if m.role != 'system' %}{{ m.content }}{% endif %}")


def chat_tokenizer(template: str = CHATML):
    """The byte tokenizer with the special tokens of these templates."""
    tokenizer = byte_tokenizer()
    names = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.chat_template = template
    return tokenizer
