"""From a PaliGemma checkpoint to a paliedge bundle, without torch."""
