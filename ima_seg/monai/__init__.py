"""What goes with MONAI."""
