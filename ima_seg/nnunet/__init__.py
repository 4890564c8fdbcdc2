"""What knows nnU-Net: everything else in :mod:`ima_seg` works without it."""
