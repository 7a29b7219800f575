"""The composed config as plain values, the values that options take, and the dot paths it names."""
