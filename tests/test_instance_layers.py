"""All layers of the instance networks, against tables that were read beside sections 5.2, 7 and 11 of their papers."""

from __future__ import annotations

import pytest
import torch
from layer_table import layer_table, stored

from seglight.models import FPNMaskProposal, MaskRCNN, MaskRCNNC4, PANet


@pytest.mark.fidelity
@pytest.mark.parametrize(
    ("name", "model", "options"),
    [
        ("maskrcnn", MaskRCNN, {"num_classes": 80}),
        ("maskrcnn_c4", MaskRCNNC4, {"num_classes": 80}),
        ("panet", PANet, {"num_classes": 80}),
        ("fpn_proposals", FPNMaskProposal, {}),
    ],
)
def test_layer_tables(name, model, options):
    """Kernels, strides, padding, widths and frozen batch norms of the default networks."""
    with torch.device("meta"):
        assert layer_table(model(**options).network) == stored(name)
