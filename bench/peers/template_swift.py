"""Nano's template for ms-swift, whose own ends a question with a line break; run by its own Python, not by ours."""

from swift.template import TemplateMeta, register_template
from swift.template.templates.llava import LlavaHfTemplate

register_template(
    TemplateMeta(
        "nano",
        prefix=["<s>"],
        prompt=["USER: {{QUERY}} ASSISTANT:"],
        chat_sep=["</s>"],
        suffix=["</s>"],
        template_cls=LlavaHfTemplate,
    )
)
