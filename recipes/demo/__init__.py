"""A small MoIIE trained from scratch on pictures of coloured shapes: data, training and the trained model.

python -m moiie_recipes.demo.train --out build/demo-training
"""
