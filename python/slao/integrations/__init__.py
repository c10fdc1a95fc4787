"""Thin hooks into other training frameworks, each in a module of its own that loads its framework when it is used."""
