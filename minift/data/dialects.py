"""The Jinja programs of the ready chat templates (templates.py has the table and what each is written from).

Every line begins with {%- or {{-, which removes the line break and the indentation before it: only what stands in
quotation marks is written. What the assistant says, its end-of-turn token included, lies in {% generation %} blocks;
they begin where the generation prompt ends, so that what is trained is what the model has to write itself.
"""

CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

LLAMA2 = r"""
{%- set system = '' %}
{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for message in turns %}
    {%- if message.role != ['user', 'assistant'][loop.index0 % 2] %}
        {{- raise_exception('after the system message, user and assistant must take turns') }}
    {%- elif message.role == 'user' %}
        {{- bos_token + '[INST] ' + ((system if loop.first else '') + message.content) | trim + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message.content | trim + ' ' + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

MISTRAL = r"""
{%- set system = '' %}
{%- set turns = messages %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\n\n' if messages[0].content else '' %}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- if tools %}{{- raise_exception('this template does not write tools') }}{%- endif %}
{%- set last_user = (turns | length - 1) // 2 * 2 %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role != ['user', 'assistant'][loop.index0 % 2] %}
        {{- raise_exception('after the system message, user and assistant must take turns') }}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' + (system if loop.index0 == last_user else '') + message.content + '[/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message.content + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""

PHI3 = r"""
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('there is no role ' + message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- elif messages[-1].role == 'assistant' %}
    {%- generation %}{{- eos_token }}{%- endgeneration %}
{%- else %}
    {{- eos_token }}
{%- endif %}
"""

ZEPHYR = r"""
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('there is no role ' + message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
"""

GEMMA = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- raise_exception('there is no system role; write it into the first user message') }}
    {%- elif message.role != ['user', 'assistant'][loop.index0 % 2] %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- elif message.role == 'user' %}
        {{- '<start_of_turn>user\n' + message.content | trim + '<end_of_turn>' }}
    {%- else %}
        {{- '<start_of_turn>model\n' }}
        {%- generation %}{{- message.content | trim + '<end_of_turn>' }}{%- endgeneration %}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}
"""

# The three channels of an assistant: thoughts go to analysis, calls of functions to commentary, answers to final.
# Thoughts are forgotten once there is an answer: only the last turn of a training row shows them.
HARMONY = r"""
{%- if tools %}{{- raise_exception('this template does not write tools') }}{%- endif %}
{{- '<|start|>system<|message|>' }}
{{- model_identity | default('You are ChatGPT, a large language model trained by OpenAI.') }}
{{- '\nKnowledge cutoff: 2024-06\nCurrent date: ' + strftime_now('%Y-%m-%d') }}
{{- '\n\nReasoning: ' + reasoning_effort | default('medium') }}
{{- '\n\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>' }}
{%- set turns = messages %}
{%- if messages[0].role in ['system', 'developer'] %}
    {%- set turns = messages[1:] %}
    {%- if messages[0].content %}
        {{- '<|start|>developer<|message|># Instructions\n\n' + messages[0].content + '\n\n<|end|>' }}
    {%- endif %}
{%- endif %}
{%- set called = namespace(name='') %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
    {%- elif message.role == 'tool' and called.name %}
        {{- '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- message.content | tojson + '<|end|>' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {%- if message.tool_calls | length > 1 or (message.content and message.thinking) %}
            {{- raise_exception('an assistant message holds one call and one thought, in content or in thinking') }}
        {%- endif %}
        {%- set later = turns[loop.index:] | selectattr('role', 'eq', 'assistant') | rejectattr('tool_calls') | list %}
        {%- set thought = '' if later else message.content or message.thinking %}
        {%- set call = message.tool_calls[0].function or message.tool_calls[0] %}
        {%- set called.name = call.name %}
        {{- '<|start|>assistant' }}
        {%- generation %}
            {%- if thought %}
                {{- '<|channel|>analysis<|message|>' + thought + '<|end|><|start|>assistant' }}
            {%- endif %}
            {{- ' to=functions.' + call.name + '<|channel|>commentary ' + call.content_type | default('json') }}
            {{- '<|message|>' + call.arguments | tojson + '<|call|>' }}
        {%- endgeneration %}
    {%- elif message.role == 'assistant' %}
        {%- set last = loop.last and not add_generation_prompt %}
        {%- set called.name = called.name if last else '' %}
        {{- '<|start|>assistant' }}
        {%- generation %}
            {%- if last and message.thinking is defined %}
                {{- '<|channel|>analysis<|message|>' + message.thinking + '<|end|><|start|>assistant' }}
            {%- endif %}
            {{- '<|channel|>final<|message|>' + message.content + ('<|return|>' if last else '<|end|>') }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('there is no place for a message of the role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant' }}
{%- endif %}
"""

SMOLLM3_NAME = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
SMOLLM3_THINK = (
    f"{SMOLLM3_NAME} "
    "Your role as an assistant involves thoroughly exploring questions through a systematic thinking process "
    "before providing the final precise and accurate solutions. This requires engaging in a comprehensive "
    "cycle of analysis, summarizing, exploration, reassessment, reflection, backtracking, and iteration to "
    "develop well-considered thinking process. Please structure your response into two main sections: Thought "
    "and Solution using the specified format: <think> Thought section </think> Solution section. In the "
    "Thought section, detail your reasoning process in steps. Each step should include detailed considerations "
    "such as analysing questions, summarizing relevant findings, brainstorming new ideas, verifying the "
    "accuracy of the current steps, refining any errors, and revisiting previous steps. In the Solution "
    "section, based on various attempts, explorations, and reflections from the Thought section, "
    "systematically present the final solution that you deem correct. The Solution section should be logical, "
    "accurate, and concise and detail necessary steps needed to reach the conclusion."
)
# The published template leaves the system turn open where there are no tools, and the model was trained so.
SMOLLM3 = (
    (
        r"""
{%- if tools or xml_tools or python_tools %}{{- raise_exception('this template does not write tools') }}{%- endif %}
{%- set think = enable_thinking | default(true) %}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if '/no_think' in system %}
    {%- set think = false %}
{%- elif '/think' in system %}
    {%- set think = true %}
{%- endif %}
{%- set text = system.replace('/no_think', '').replace('/think', '').replace('/system_override', '').rstrip() %}
{{- '<|im_start|>system\n' }}
{%- if '/system_override' in system %}
    {{- text + '<|im_end|>\n' }}
{%- else %}
    {{- '## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' + strftime_now('%d %B %Y') }}
    {{- '\nReasoning Mode: ' + ('/think' if think else '/no_think') + '\n\n## Custom Instructions\n\n' }}
    {{- (text or ('THINK' if think else 'NAME')) + '\n\n' }}
{%- endif %}
{%- set header = '<|im_start|>assistant\n' + ('' if think else '<think>\n\n</think>\n') %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- header }}
        {%- generation %}{{- message.content.lstrip('\n') + '<|im_end|>' }}{%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role in ['user', 'tool'] %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- raise_exception('there is no place for a message of the role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header }}
{%- endif %}
"""
    )
    .replace("THINK", SMOLLM3_THINK)
    .replace("NAME", SMOLLM3_NAME)
)
