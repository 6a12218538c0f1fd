"""Checkpoints of any trainer here: whole or not at all, without pickle, found again and checked."""
