"""A five-class U-Net as a Keras user writes it, trained by lossledger with the ledger on.

Set KERAS_BACKEND=torch before the first import of keras. What to see: the model stays a Keras model, and the printed
validation loss comes with its parts: the cross-entropy of each class where it is present and where it is absent, the
penalty of the regularized kernel, which is a quarter of it. They add up to it, and the rare digit 4 is hardly in it.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
from keras import layers

import lossledger as ll
from lossledger.demo.scenes import CLASS_NAMES, make_scenes

SCENES, EPOCHS = int(os.environ.get("SCENES", "512")), int(os.environ.get("EPOCHS", "6"))


def convolutions(x, filters):
    for _ in range(2):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu", kernel_initializer="he_normal")(x)
    return x


def unet(size=64, filters=(8, 16, 32)):
    inputs = x = keras.Input((size, size, 3))
    kept = []
    for width in filters[:-1]:
        x = convolutions(x, width)
        kept.append(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Dropout(0.1)(convolutions(x, filters[-1]))
    for width, finer in zip(filters[-2::-1], kept[::-1], strict=True):
        x = layers.Conv2DTranspose(width, 2, strides=2)(x)
        x = convolutions(layers.Concatenate()([finer, x]), width)
    return keras.Model(inputs, layers.Conv2D(5, 1, activation="sigmoid", kernel_regularizer="l2", name="masks")(x))


def main():
    keras.utils.set_random_seed(0)
    training, held = make_scenes(SCENES), make_scenes(SCENES // 4, split="validation")
    # Keras holds the channels last, scenes the axis that torch expects.
    x, x_held = (scenes.images.transpose(0, 2, 3, 1) for scenes in (training, held))
    model = ll.Model(unet())
    model.compile(keras.optimizers.Adam(0.002), "binary_crossentropy", metrics=["iou"], class_names=CLASS_NAMES)
    history = model.fit(x, training.masks, 16, EPOCHS, validation_data=(x_held, held.masks), verbose=0, seed=0)
    print(f"training loss {history.history['loss'][0]:.4f} -> {history.history['loss'][-1]:.4f}")
    rows = [row for row in history.ledger.rows if row.split == "validation" and row.epoch == EPOCHS]
    shares = [row for row in rows if row.kind == "class" or row.role == "regularizer"]
    for row in sorted(shares, key=lambda row: -row.contribution):
        print(f"{row.term:22} {row.group:8} {row.presence:8} {row.contribution:.5f}")
    print(f"sum of the parts {sum(row.contribution for row in shares):.5f}")
    print(f"validation loss  {history.history['val_loss'][-1]:.5f}")


if __name__ == "__main__":
    main()
