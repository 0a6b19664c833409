defmodule Bridge.Pool.Window do
  @moduledoc false
  # How many of the last `size` commands failed. A value.

  @enforce_keys [:size]
  defstruct [:size, length: 0, outcomes: :queue.new(), failures: 0]

  @type t :: %__MODULE__{}

  @spec new(pos_integer()) :: t()
  def new(size), do: %__MODULE__{size: size}

  @spec add(t(), boolean()) :: t()
  def add(%{size: size, length: size} = window, failed) do
    {{:value, oldest}, outcomes} = :queue.out(window.outcomes)
    failures = window.failures - if(oldest, do: 1, else: 0)
    add(%{window | length: size - 1, outcomes: outcomes, failures: failures}, failed)
  end

  def add(window, failed) do
    failures = window.failures + if(failed, do: 1, else: 0)
    %{window | length: window.length + 1, outcomes: :queue.in(failed, window.outcomes), failures: failures}
  end

  @spec failures(t()) :: non_neg_integer()
  def failures(window), do: window.failures

  @doc "0 to 1; 0 if there was none."
  @spec rate(t()) :: float()
  def rate(%{length: 0}), do: 0.0
  def rate(window), do: window.failures / window.length
end
