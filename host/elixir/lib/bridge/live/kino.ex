defmodule Bridge.Live.Kino do
  @moduledoc false
  # The one seam to Kino, which may not be there: found when it is asked for, called by `apply`.

  @doc "Whether Kino is there."
  @spec there?() :: boolean()
  def there?, do: Code.ensure_loaded?(Kino) and Code.ensure_loaded?(Kino.Frame)

  @doc "A frame for whoever shows it."
  @spec frame() :: term()
  def frame, do: call(Kino.Frame, :new, [])

  @doc """
  A frame beneath the cell whose group leader this is.
  """
  @spec frame(pid()) :: term()
  def frame(leader) do
    within(leader, fn ->
      frame = frame()
      call(Kino, :render, [frame])
      frame
    end)
  end

  @doc "What tells one cell from another that has the same group leader; nil if Livebook does not say."
  @spec cell(pid()) :: String.t() | nil
  def cell(leader) do
    if Code.ensure_loaded?(Kino.Bridge) and function_exported?(Kino.Bridge, :get_evaluation_file, 0) do
      case within(leader, fn -> call(Kino.Bridge, :get_evaluation_file, []) end) do
        {:ok, file} -> file
        _no_livebook -> nil
      end
    end
  end

  @doc "The process of a frame, which ends when its cell is run anew; nil if it is not known."
  @spec process(term()) :: pid() | nil
  def process(%{pid: pid}) when is_pid(pid), do: pid
  def process(_frame), do: nil

  @doc "Shows HTML in a frame, in place of what is there."
  @spec show(term(), String.t()) :: :ok
  def show(frame, html), do: put(frame, html(html))

  @doc "Shows something in a frame, in place of what is there."
  @spec put(term(), term()) :: :ok
  def put(frame, term) do
    call(Kino.Frame, :render, [frame, term])
    :ok
  end

  @doc "Shows something beneath the cell whose group leader this is."
  @spec render(pid(), term()) :: :ok
  def render(leader, term) do
    within(leader, fn -> call(Kino, :render, [term]) end)
    :ok
  end

  @doc "Calls the function every so many milliseconds, until the cell is run anew."
  @spec every(pos_integer(), (term() -> term())) :: :ok
  def every(ms, fun) do
    call(Kino, :listen, [ms, fun])
    :ok
  end

  @spec html(String.t()) :: term()
  def html(html), do: call(Kino.HTML, :new, [html])

  @spec markdown(String.t()) :: term()
  def markdown(text), do: call(Kino.Markdown, :new, [text])

  @spec image(binary(), String.t()) :: term()
  def image(bytes, mime), do: call(Kino.Image, :new, [bytes, mime])

  @spec text(String.t()) :: term()
  def text(text), do: call(Kino.Text, :new, [text])

  # Not `apply` itself with a name in it: compilers warn of modules that are not there.
  defp call(module, name, arguments), do: apply(module, name, arguments)

  # Livebook shows what a process gives out beneath the cell whose group leader the process has.
  defp within(leader, fun) do
    own = Process.group_leader()
    Process.group_leader(self(), leader)

    try do
      fun.()
    after
      Process.group_leader(self(), own)
    end
  end
end
