"""Files of other labeling tools: Argilla, Label Studio, Potato, arena battles, Prodigy."""
