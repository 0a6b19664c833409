defprotocol Bridge.Encodable do
  @moduledoc """
  How a struct of yours crosses the bridge: as the value that `to_value/1` gives. Without it a struct is refused, for
  most of what is in one is nobody else's business.

      defimpl Bridge.Encodable, for: MyApp.Point do
        def to_value(point), do: %{"x" => point.x, "y" => point.y}
      end

  Or derive it. The fields then become a map with strings for keys; with `class:` they become an instance of that Python
  dataclass (`kind:` names another kind of `Bridge.Record`). `only:` and `except:` choose fields.

      @derive {Bridge.Encodable, class: "myapp.Point", except: [:cache]}
      defstruct [:x, :y, :cache]
  """

  @doc "The value that crosses in the struct's place."
  @spec to_value(t) :: term()
  def to_value(struct)
end

defimpl Bridge.Encodable, for: Any do
  defmacro __deriving__(module, struct, opts) do
    fields = Map.keys(struct) -- [:__struct__ | Keyword.get(opts, :except, [])]
    fields = Enum.filter(Keyword.get(opts, :only, fields), &(&1 in fields))
    {class, kind} = {opts[:class], Keyword.get(opts, :kind, :dataclass)}

    quote do
      defimpl Bridge.Encodable, for: unquote(module) do
        def to_value(struct) do
          fields = Map.new(unquote(fields), &{Atom.to_string(&1), Map.fetch!(struct, &1)})

          unquote(
            if class,
              do: quote(do: Bridge.Record.new(unquote(class), fields, kind: unquote(kind))),
              else: quote(do: fields)
          )
        end
      end
    end
  end

  def to_value(struct), do: raise(Protocol.UndefinedError, protocol: @protocol, value: struct)
end
