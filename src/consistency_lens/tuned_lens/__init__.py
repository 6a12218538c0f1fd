"""The tuned lens: one affine translator a layer, decoded by the subject's own head (Belrose et al. 2023)."""
