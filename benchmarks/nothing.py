"""A model that looks at no photograph: MLflow runs this file from the model's folder."""

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Nothing(PythonModel):
    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        answer = {"label": "0", "probability": 1.0, "probabilities": {str(digit): 0.1 for digit in range(10)}}
        return pd.DataFrame([answer] * len(model_input))


set_model(Nothing())
