defmodule Bridge.Telemetry.Event do
  @moduledoc "An event that is remembered. `at` is when it was taken, in native system time."

  @enforce_keys [:name, :measurements, :metadata, :at]
  defstruct [:name, :measurements, :metadata, :at]

  @type t :: %__MODULE__{name: [atom()], measurements: map(), metadata: map(), at: integer()}
end
