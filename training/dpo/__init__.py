"""DPO and mDPO by TRL's trainer: rows, objective, reference, and the fit."""
