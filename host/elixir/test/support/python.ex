defmodule Bridge.TestKernels do
  @moduledoc "The Python that tests start kernels with."

  @doc "`BRIDGE_PYTHON`, or the one of the repository's virtual environment."
  @spec python() :: Path.t()
  def python do
    System.get_env("BRIDGE_PYTHON") || Path.expand("../../../../.venv/bin/python", __DIR__)
  end
end
