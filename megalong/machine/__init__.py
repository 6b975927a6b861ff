"""What is this machine and what can it do, as measured here?"""
