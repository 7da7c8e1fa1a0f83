"""A small MoME trained from scratch on pictures of coloured shapes with letters: data, training and the trained model.

python -m moiie_recipes.demo.mome.train --out build/demo-mome-training
"""
