"""Nodes that Ray's autoscaler adds: raylets of this machine, by the provider that Ray tests it with."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Nodes(FakeMultiNodeProvider):
    """With memory, as ranks ask for it: a kind of node says how much, and the raylet finds out by itself."""

    def create_node_with_resources_and_labels(
        self, config: Any, tags: Any, count: int, resources: dict[str, Any], labels: Any
    ) -> None:
        known = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(config, tags, count, known, labels)
