defmodule Bridge.Ref do
  @moduledoc """
  Stands for an object that the session owns: its recipe and state live here, and Python rebuilds it for each call.

  As an argument it arrives in Python as the object itself. `class` is its class's dotted name, `version` counts its
  states. `session` and `bridge` say whose it is; they do not cross the wire.

      iex> %Bridge.Ref{id: "r-1", class: "dspy.Predict", version: 3}
      #Bridge.Ref<dspy.Predict r-1, version 3>
  """

  @enforce_keys [:id]
  defstruct [:id, :class, :version, :session, :bridge]

  @type t :: %__MODULE__{
          id: String.t(),
          class: String.t() | nil,
          version: non_neg_integer() | nil,
          session: String.t() | nil,
          bridge: atom()
        }

  defimpl Inspect do
    def inspect(ref, _opts) do
      class = if ref.class in [nil, ""], do: "", else: "#{ref.class} "
      version = if ref.version, do: ", version #{ref.version}", else: ""
      "#Bridge.Ref<#{class}#{ref.id}#{version}>"
    end
  end
end

defmodule Bridge.Tool do
  @moduledoc """
  Stands for a tool of the session. As an argument it arrives in Python as a function that calls the tool.

  `schema` is the JSON Schema of its arguments.

      iex> %Bridge.Tool{name: "add"}
      #Bridge.Tool<add>
  """

  @enforce_keys [:name]
  defstruct [:name, :schema, description: ""]

  @type t :: %__MODULE__{name: String.t(), description: String.t(), schema: map() | nil}

  defimpl Inspect do
    def inspect(tool, _opts), do: "#Bridge.Tool<#{tool.name}>"
  end
end

defmodule Bridge.Variable do
  @moduledoc """
  Stands for a variable of the session, by name. As an argument it arrives in Python as the variable's value.

      iex> %Bridge.Variable{name: "temperature"}
      #Bridge.Variable<temperature>
  """

  @enforce_keys [:name]
  defstruct [:name]

  @type t :: %__MODULE__{name: String.t()}

  defimpl Inspect do
    def inspect(variable, _opts), do: "#Bridge.Variable<#{variable.name}>"
  end
end
