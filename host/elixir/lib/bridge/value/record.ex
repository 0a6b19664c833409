defmodule Bridge.Record do
  @moduledoc """
  An instance of a Python class with named fields: a dataclass, a pydantic model, a named tuple, a member of an
  enumeration, or a registered class such as `dspy.Prediction`.

  Its class is not here, so it is kept as `class` and `fields`, and goes back to Python as what it was.
  `record["answer"]` reads a field, and `put_in(record["answer"], …)` writes one. A member of an enumeration has the one
  field `"name"`. `fields_set`, `extra` and `private` are pydantic's.

      iex> prediction = Bridge.Record.new("dspy.Prediction", %{"answer" => "Paris"})
      iex> inspect(prediction)
      ~S[dspy.Prediction(answer: "Paris")]
      iex> prediction["answer"]
      "Paris"
      iex> put_in(prediction["answer"], "Rome")["answer"]
      "Rome"
  """

  @behaviour Access

  @enforce_keys [:class]
  defstruct [:class, :fields_set, :extra, :private, kind: :record, fields: %{}]

  @type kind :: :dataclass | :pydantic | :namedtuple | :enum | :record
  @type t :: %__MODULE__{
          kind: kind(),
          class: String.t(),
          fields: %{optional(String.t()) => term()},
          fields_set: [String.t()] | nil,
          extra: %{optional(String.t()) => term()} | nil,
          private: %{optional(String.t()) => term()} | nil
        }

  @doc "A record of that class. `kind:` is `:record` unless it is given."
  @spec new(String.t(), %{optional(String.t()) => term()}, keyword()) :: t()
  def new(class, fields, opts \\ []) when is_binary(class) and is_map(fields) do
    struct!(%__MODULE__{class: class, fields: fields}, opts)
  end

  @doc "The names of its fields, sorted."
  @spec keys(t()) :: [String.t()]
  def keys(%__MODULE__{fields: fields}), do: fields |> Map.keys() |> Enum.sort()

  @impl Access
  def fetch(%__MODULE__{fields: fields}, name), do: Map.fetch(fields, name)

  @impl Access
  def get_and_update(%__MODULE__{fields: fields} = record, name, fun) do
    {got, fields} = Map.get_and_update(fields, name, fun)
    {got, %{record | fields: fields}}
  end

  @impl Access
  def pop(%__MODULE__{fields: fields} = record, name) do
    {got, fields} = Map.pop(fields, name)
    {got, %{record | fields: fields}}
  end

  defimpl Inspect do
    import Inspect.Algebra

    def inspect(%{kind: :enum, class: class, fields: %{"name" => name}}, _opts) when is_binary(name) do
      "#{class}.#{name}"
    end

    def inspect(%{class: class, fields: %{} = fields} = record, opts) when is_binary(class) do
      fields = Enum.sort(Map.to_list(fields) ++ Map.to_list(record.extra || %{}))
      container_doc(class <> "(", fields, ")", opts, &field/2, separator: ",", break: :flex)
    end

    def inspect(record, opts), do: Inspect.Any.inspect(record, opts)

    defp field({name, value}, opts) do
      shown = if name =~ ~r/\A[A-Za-z_][A-Za-z0-9_]*\z/, do: name, else: Kernel.inspect(name)
      concat(shown <> ": ", to_doc(value, opts))
    end
  end
end
