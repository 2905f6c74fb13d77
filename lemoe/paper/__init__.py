"""Preset `paper`: LEMoE as published, one FFN-form expert a round, routed by a trained projection."""
