"""YAML without duplicate keys: PyYAML silently takes the last of the values."""

from __future__ import annotations

from typing import Any


class TwiceError(ValueError):
    """A mapping has a key twice."""


def load_yaml(text: str) -> object:
    """What a YAML text says. TwiceError for a key that a mapping has twice, PyYAML's for others."""
    import yaml

    class Loader(yaml.SafeLoader):
        # Where nodes are composed: later, `<<` has put the keys of other mappings among them.
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                is_merge = key.tag == "tag:yaml.org,2002:merge"
                value = key.value if is_merge else self.construct_object(key)
                if value in seen:
                    line = key.start_mark.line + 1
                    raise TwiceError(f"{key.value}: appears twice, again in line {line}")
                seen.add(value)
            return node

    return yaml.load(text, Loader)
