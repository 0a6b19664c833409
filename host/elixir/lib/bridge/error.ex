defmodule Bridge.Error do
  @moduledoc """
  What went wrong, on either side: an exception that is also a value.

  `name` says which error it is, in the words of the contract (`:remote_error`, `:not_found`, …; `names/0` has all). Of a
  Python exception, `type` is its class (`"ValueError"`), `message` its text and `traceback` the kernel's frames, outermost
  first. `remedy` says what to do. `retryable` says whether the same command may succeed when it is run again.

  Functions return `{:error, %Bridge.Error{}}`; those that end in `!` raise it.
  """

  @type frame :: %{file: String.t(), line: integer(), function: String.t(), code: String.t()}

  @type t :: %__MODULE__{
          name: atom(),
          code: integer(),
          type: String.t(),
          message: String.t(),
          traceback: [frame()],
          retryable: boolean(),
          remedy: String.t()
        }

  defexception [:name, :code, type: "", message: "", traceback: [], retryable: false, remedy: ""]

  # {code, name, retryable, summary, remedy}; tests/vectors/errors.json has the same table.
  @table [
    {-32000, :remote_error, false, "The code that the command ran raised an exception.", ""},
    {-32001, :tool_error, false, "A tool raised an exception in the host.", ""},
    {-32002, :cancelled, false, "The command was cancelled.", ""},
    {-32003, :deadline_exceeded, false, "The command's deadline passed before it ended.",
     "Give it more time, e.g. Bridge.call(session, function, args, deadline: 60_000)."},
    {-32004, :not_serializable, false, "A value cannot cross the bridge.", "Convert it to plain data first."},
    {-32005, :not_found, false, "There is no such variable, instance, tool, function or session.",
     "Look at what there is: inspect the session."},
    {-32006, :conflict, true, "Another call changed the instance while this one ran.",
     "Call it again: it then starts from the new state."},
    {-32007, :policy_denied, false, "The kernel's policy does not allow this.",
     "Widen the policy where the kernel is started, e.g. {Bridge, arguments: [\"--Policy.allow_names=*\"]}."},
    {-32008, :invalid_arguments, false, "The arguments do not fit the tool's schema.",
     "Compare them with the schema: Bridge.Tools.fetch(session, name)."},
    {-32009, :overloaded, true, "The kernel has as many commands as it takes.",
     "Run fewer at once, or start more kernels: {Bridge, kernels: n}."},
    {-32010, :draining, true, "The kernel is draining: it finishes what it has and takes no more.",
     "Send the command to another kernel."},
    {-32011, :protocol_mismatch, false, "Host and kernel speak different versions of the protocol.",
     "Install the same version of bridge-kernel and bridge_host."},
    {-32012, :source_missing, true, "The kernel no longer holds the source of this function.",
     "Send the command again with the function's source."},
    {-32013, :malformed_value, false, "A value on the wire is malformed.", "Encode values as docs/protocol.md says."},
    {-32014, :limit_exceeded, false, "A limit was exceeded.",
     "Send less at once, or raise the limit in the kernel's policy."},
    {-32015, :invalid_value, false, "The value does not fit the variable's type.",
     "Compare it with the type: Bridge.SessionStore.variable(session, name)."},
    {-32016, :quota_exceeded, false, "A quota of the session is used up.",
     "Delete what is not needed, or start Bridge with a larger one: {Bridge, quota: …}."},
    {-32020, :kernel_died, true, "The kernel died while the command ran.",
     "Call it again: a new kernel has taken its place. Or let Bridge try more often: retries: 5."},
    {-32021, :kernel_start_failed, false, "A kernel could not be started.", "Bridge.doctor() says what is missing."},
    {-32022, :not_attached, false, "No host is attached to this kernel.", "Attach one."},
    {-32023, :host_closed, false, "The host is closed.", "Start it: Bridge.start_link(kernels: 1)."},
    {-32024, :store_locked, false, "Another host has the store open.", "Stop that host, or open another directory."},
    {-32025, :store_damaged, false, "The store cannot be read.",
     "Restore it from a copy or an export; the files were left as they are."},
    {-32026, :store_failed, false, "The store could not be written.",
     "See to the disk (space, permissions), then start Bridge anew."},
    {-32027, :replay_diverged, false, "The command did something else when it ran again.",
     "Make it repeatable (no clock, no chance before its tools are called), or register the tool with idempotent: true."},
    {-32028, :quarantined, false, "The command kills the kernels it runs on, and is not run again.",
     "Mend it, then let it out: Bridge.release(name)."},
    {-32029, :queue_full, true, "Too many commands wait for a kernel.",
     "Send fewer at once, or add kernels: Bridge.scale(n)."},
    {-32030, :circuit_open, true, "The command is held back, for it keeps failing its kernels.",
     "Wait as long as the message says, or mend what makes it hang."},
    {-32031, :effect_in_doubt, false, "Whether a tool's effect happened is not known.",
     "Look, then say so: Bridge.resume(id, replies: %{call => result}) or Bridge.resume(id, rerun: [call])."},
    {-32032, :secret_unreadable, false, "A secret cannot be unsealed.",
     "Put the key back where it was, or set the secret anew: Bridge.Secrets.put(session, name, value)."},
    {-32600, :invalid_request, false, "The message is JSON, but not a JSON-RPC 2.0 message.",
     "Send \"jsonrpc\": \"2.0\" with a method, or with a result or an error and the id it answers."},
    {-32601, :method_not_found, false, "There is no such command.", "Bridge.contract() lists the commands."},
    {-32602, :invalid_params, false, "The parameters do not fit the command's schema.",
     "See what is taken: h Bridge.call in IEx, of the function that you called."},
    {-32603, :internal_error, false, "Something inside Bridge failed.", "Please report this, with the traceback."},
    {-32700, :parse_error, false, "The message is not JSON.",
     "Send one JSON-RPC 2.0 message as the comm message's data."}
  ]
  @by_code Map.new(@table, fn {code, name, _, _, _} -> {code, name} end)
  @by_name Map.new(@table, fn {code, name, retryable, summary, remedy} -> {name, {code, retryable, summary, remedy}} end)

  @doc "An error of that name, with its message; `remedy:`, `type:`, `traceback:` and `retryable:` replace what the table says."
  @spec new(atom(), String.t() | nil, keyword()) :: t()
  def new(name, message \\ nil, opts \\ []) do
    {code, retryable, summary, remedy} = Map.fetch!(@by_name, name)

    struct!(
      %__MODULE__{
        name: name,
        code: code,
        type: "bridge." <> Macro.camelize(Atom.to_string(name)),
        message: message || summary,
        retryable: retryable,
        remedy: remedy
      },
      opts
    )
  end

  @doc "`{:error, new(…)}`."
  @spec error(atom(), String.t() | nil, keyword()) :: {:error, t()}
  def error(name, message \\ nil, opts \\ []), do: {:error, new(name, message, opts)}

  @doc "The names of all errors there are."
  @spec names() :: [atom()]
  def names, do: Map.keys(@by_name)

  @doc "Every error of the contract: `{code, name, retryable, summary, remedy}`."
  @spec table() :: [{integer(), atom(), boolean(), String.t(), String.t()}]
  def table, do: @table

  @doc "The name of a code; one that this host does not know is `:internal_error`."
  @spec name_of(integer()) :: atom()
  def name_of(code), do: Map.get(@by_code, code, :internal_error)

  @doc """
  The error as it is shown where it is raised: type and text, where in Python it came from, and what to do.

      iex> Exception.message(Bridge.Error.new(:not_found, "no tool \"x\"", remedy: "There is: \"y\"."))
      "no tool \"x\"\nRemedy: There is: \"y\"."
  """
  @impl true
  def message(%__MODULE__{} = error) do
    said =
      case error do
        %{type: "bridge." <> _} -> error.message
        %{type: ""} -> error.message
        %{message: ""} -> error.type
        _python -> "#{error.type}: #{error.message}"
      end

    frames = for frame <- error.traceback, do: "  #{frame.file}:#{frame.line} in #{frame.function}#{code(frame.code)}"
    remedy = if error.remedy == "", do: [], else: ["Remedy: " <> error.remedy]
    Enum.join([said] ++ frames ++ remedy, "\n")
  end

  defp code(""), do: ""
  defp code(code), do: "\n    " <> String.trim(code)
end
