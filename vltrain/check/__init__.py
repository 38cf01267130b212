"""What a user runs before paying for GPUs: will a recipe fit?"""
