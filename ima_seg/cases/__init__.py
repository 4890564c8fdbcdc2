"""Cases that are evaluated: found, checked, held in memory and written, whatever model sees them."""
