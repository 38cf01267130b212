"""Packed rows: how their segments are laid out, and what each may see."""
