"""Drafting: where a draft comes from. The contract between loop and policy, and every policy."""
