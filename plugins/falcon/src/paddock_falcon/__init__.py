"""Falcon for Paddock: 7B, 40B, 180B, 11B and RW."""
