"""GSM, the booster around hosts that compare features of cells."""
